"""What a pool asks of a kind of work and of what comes of it, whatever is done."""

from typing import Protocol, TypeVar


class Result(Protocol):
    """What came of work.

    Attributes:
        failure: why nothing did, in one line, or None.
        seconds: wall time.
    """

    @property
    def failure(self) -> str | None: ...

    @property
    def seconds(self) -> float: ...


ResultOf = TypeVar("ResultOf", bound=Result, covariant=True)


class Work(Protocol[ResultOf]):
    """What a worker is handed.

    Attributes:
        size: how much there is to do, in a unit of its kind; time limits grow with it.
    """

    @property
    def size(self) -> int: ...

    def failed(self, reason: str, seconds: float, error_class: str) -> ResultOf:
        """The result of work that came to nothing.

        Args:
            reason: in one line.
            seconds: that were spent on it.
            error_class: "raised" (the work's own fault); "timeout", "memory" or "died".
        """
