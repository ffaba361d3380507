"""Tasks that wait for a place, in their order."""

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from apportion.workers.bill import Loss
from apportion.workers.work import Result, Work


class Lost(Exception):
    """A worker was lost with its work.

    Attributes:
        outcome: how.
        reason: the same as a part of a sentence, "took longer than 60 s".
        replace: makes the place fit for work again, or raises ApportionError.
        comparison: what follows the reason, "; evaluations like it take 8 s", or nothing.
        by_work: whether the work may be the cause; not if the worker was dead before.
        place_may_wait: whether `replace` may take for ever, so that the work goes on before.
    """

    def __init__(
        self,
        outcome: Loss,
        reason: str,
        replace: Callable[[], None],
        *,
        comparison: str = "",
        by_work: bool = True,
        place_may_wait: bool = False,
    ) -> None:
        super().__init__(reason)
        self.outcome: Loss = outcome
        self.reason = reason
        self.replace = replace
        self.comparison = comparison
        self.by_work = by_work
        self.place_may_wait = place_may_wait


@dataclass(eq=False)
class Task:
    """Work, and what has become of it so far.

    Attributes:
        seconds: of executions that were lost.
        losses: those that it may be the cause of.
        avoided: the place that it was lost in last.
        is_alone: not to be handed to a worker with others.
    """

    work: Work[Any]
    future: "Future[Any]" = field(default_factory=Future)
    seconds: float = 0.0
    losses: list[Lost] = field(default_factory=list)
    avoided: int | None = None
    is_alone: bool = False

    def begin(self) -> bool:
        """Whether it is still wanted."""
        return self.future.running() or self.future.set_running_or_notify_cancel()

    def failure(self) -> Result:
        """What is known after the last loss."""
        first, last = self.losses[0], self.losses[-1]
        same = first.reason == last.reason
        told = f"{last.reason} twice" if same else f"{first.reason}, then {last.reason}"
        failed: Result = self.work.failed(told + last.comparison, self.seconds, last.outcome)
        return failed


class Waiting:
    """A queue for places, of which some may be away.

    A place does not get back what it lost, unless no other is here.

    Attributes:
        closed: whether nothing is taken in any more.
        error: why no place is left, or None.
    """

    def __init__(self, places: int, *, are_here: bool) -> None:
        """Takes how many places there are, and whether they are fit for work."""
        self._expected = set(range(places))
        self._here = set(self._expected) if are_here else set()
        self._tasks: deque[Task] = deque()
        self._changed = threading.Condition()
        self.closed = False
        self.error: BaseException | None = None

    def put(self, task: Task) -> bool:
        """Whether it was taken in. What was begun before comes before what was not."""
        with self._changed:
            if self.closed:
                return False
            if task.future.running():
                self._tasks.appendleft(task)
            else:
                self._tasks.append(task)
            self._changed.notify_all()
            return True

    def take(self, place: int, together: Callable[[Work[Any]], int]) -> list[Task]:
        """Waits for tasks, several only where enough is left for the others; none at the end."""
        with self._changed:
            while not self.closed and place in self._expected:
                fit = (t for t in self._tasks if t.avoided != place or self._here == {place})
                if first := next(fit, None):
                    share = len(self._tasks) // max(1, len(self._here))
                    most = 1 if first.is_alone else min(share, together(first.work))
                    others = (task for task in fit if not task.is_alone)
                    taken = [first, *islice(others, max(0, most - 1))]
                    for task in taken:
                        self._tasks.remove(task)
                    return taken
                self._changed.wait()
            return []

    def arrive(self, place: int) -> None:
        """A place is fit for work."""
        with self._changed:
            self._here.add(place)
            self._changed.notify_all()

    def depart(self, place: int) -> None:
        """A place is not fit for work for a while."""
        with self._changed:
            self._here.discard(place)
            self._changed.notify_all()

    def leave(self, place: int, error: BaseException) -> list[Task]:
        """A place will never be fit again; with the last, gives the tasks that nobody takes."""
        with self._changed:
            self._expected.discard(place)
            self._here.discard(place)
            self._changed.notify_all()
            if self._expected or self.closed:
                return []
            self.error = error
        return self.close()

    def close(self) -> list[Task]:
        """Gives the tasks that nobody took."""
        with self._changed:
            self.closed = True
            left = list(self._tasks)
            self._tasks.clear()
            self._changed.notify_all()
            return left
