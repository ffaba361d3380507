"""What was computed last of a tensor, for whoever asks for the same again."""

from collections.abc import Callable
from typing import Any, ClassVar, Concatenate, Generic, ParamSpec, TypeVar

from torch import Tensor

Rest = ParamSpec("Rest")
Answer = TypeVar("Answer")


class Last(Generic[Rest, Answer]):
    """A function that remembers one answer, until it or another such function computes the next.

    For answers as large as a layer's statistics: a cache that gives one up after it has another
    would hold two.
    """

    _holding: "ClassVar[Last[..., Any] | None]" = None

    def __init__(self, compute: Callable[Concatenate[Tensor, Rest], Answer]) -> None:
        """Takes the function; a tensor is known by its identity."""
        self._compute = compute
        self._kept: tuple[Tensor, object, Answer] | None = None

    def __call__(self, tensor: Tensor, *rest: Rest.args, **named: Rest.kwargs) -> Answer:
        """The answer. Raises what the function raises."""
        asked = (rest, named)
        if self._kept is None or self._kept[0] is not tensor or self._kept[1] != asked:
            if Last._holding is not None:
                Last._holding.forget()
            Last._holding = self
            self._kept = tensor, asked, self._compute(tensor, *rest, **named)
        return self._kept[2]

    def forget(self) -> None:
        """Give up the answer."""
        self._kept = None
