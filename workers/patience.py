"""How long to wait for an evaluation: learned from those that finished."""

import threading
from collections import deque
from statistics import median

RECENT = 100
SHORT_SECONDS = 0.1
MOST_TOGETHER = 8
TOGETHER_SECONDS = 0.2


class Patience:
    """A time limit for work of a number of windows. Safe to use from several threads.

    It is there to end what hangs. A slow worker that lives must never be killed for it, so every
    choice here leans to waiting too long:

    - The yardstick is the slowest evaluation that ever finished, not a recent or a typical one. A
      worker's first evaluation runs the whole model, later ones may begin at a cached block and
      are far quicker; a limit learned from those would kill the next that begins at the top, or
      the first on a longer slice.
    - Fewer windows than that one had do not lower the limit, since a part of an evaluation (the
      weights it reads) does not shrink with them; more windows raise it in proportion.
    - What others do to the machine slows an evaluation; the factor leaves room for it, and each
      slower one that finishes widens the room. What was killed tells nothing.
    """

    def __init__(
        self,
        *,
        floor_seconds: float = 60.0,
        factor: float = 10.0,
        first_seconds: float = 3600.0,
        enough: int = 5,
    ) -> None:
        """Takes what a limit is made of.

        Args:
            floor_seconds: no limit is below it.
            factor: times the slowest of its like.
            first_seconds: no limit is below it before `enough` evaluations have finished. Even the
                first one may hang.
            enough: evaluations to learn from.
        """
        self._floor_seconds = floor_seconds
        self._factor = factor
        self._first_seconds = first_seconds
        self._enough = enough
        self._lock = threading.Lock()
        self._finished = 0
        self._slowest = (1, 0.0)
        self._recent: deque[float] = deque(maxlen=RECENT)

    def learn(self, windows: int, seconds: float) -> None:
        """Tell of an evaluation that finished."""
        with self._lock:
            self._finished += 1
            self._slowest = max(self._slowest, (windows, seconds), key=lambda pair: pair[1])
            self._recent.append(seconds / windows)

    def limit_seconds(self, windows: int) -> float:
        """How long to wait for an evaluation of so many windows."""
        with self._lock:
            seen_windows, seen_seconds = self._slowest
            learned = self._factor * seen_seconds * max(1.0, windows / seen_windows)
            least = self._floor_seconds
            if self._finished < self._enough:
                least = max(least, self._first_seconds)
            return max(least, learned)

    def usual_seconds(self, windows: int) -> float | None:
        """What evaluations of so many windows took lately; None before the first."""
        with self._lock:
            return median(self._recent) * windows if self._recent else None

    def together(self, windows: int) -> int:
        """How many evaluations of so many windows to hand to a process at once.

        A call costs about a millisecond, which is much beside short ones and nothing beside others.
        """
        usual = self.usual_seconds(windows)
        if usual is None or usual >= SHORT_SECONDS:
            return 1
        return min(MOST_TOGETHER, int(TOGETHER_SECONDS / max(usual, 1e-6)))
