"""The bill: seconds that workers were busy, by what came of them."""

import threading
from typing import Literal, get_args

Loss = Literal["timeout", "memory", "died"]
Outcome = Literal["done", "failed", "timeout", "memory", "died", "cancelled"]


class Bill:
    """Counts and seconds of executions by outcome. Safe to use from several threads.

    An execution lasts from when a worker's place took the work until the place is free again: a
    lost worker's replacement is part of the execution that it was lost in. So the seconds sum to
    the time that the places were taken. What still runs is not on the bill yet. Short work that was
    handed to a worker together and lost with it was one execution. In a cluster the replacement is
    on no bill: the place may wait for a node.

    Outcomes: "done"; "failed" (it raised twice, or the loss is not finite); "timeout", "memory" and
    "died" (the worker was lost); "cancelled" (it ran when the pool was closed).
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entries: dict[str, tuple[int, float]] = dict.fromkeys(get_args(Outcome), (0, 0.0))

    def add(self, outcome: Outcome, seconds: float) -> None:
        """Enter one execution."""
        with self._lock:
            count, total = self._entries[outcome]
            self._entries[outcome] = count + 1, total + seconds

    def entries(self) -> dict[str, tuple[int, float]]:
        """Outcome -> executions and their seconds, for every outcome."""
        with self._lock:
            return dict(self._entries)

    @property
    def recoveries(self) -> int:
        """Executions that were lost with their worker, and done again or given up."""
        entries = self.entries()
        return sum(entries[outcome][0] for outcome in get_args(Loss))

    @property
    def wasted_seconds(self) -> float:
        """Seconds of executions that gave no result."""
        entries = self.entries()
        return sum(entries[outcome][1] for outcome in (*get_args(Loss), "cancelled"))

    @property
    def busy_seconds(self) -> float:
        """Seconds of all executions."""
        return sum(seconds for _, seconds in self.entries().values())
