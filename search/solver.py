"""What a solver is: it proposes configurations and is told their losses, nothing else."""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from apportion.errors import ApportionError
from apportion.search.problem import Config


@dataclass(frozen=True, order=True)
class SearchSlice:
    """`windows` windows of the search data from window `first` on."""

    first: int
    windows: int

    @property
    def stop(self) -> int:
        """The window behind the last."""
        return self.first + self.windows


@dataclass(frozen=True)
class Proposal:
    """A canonical configuration to be scored on a slice.

    Attributes:
        origin: where it comes from, such as "uniform:w4g64" or "evopress:g12:s1".
        vector: what the sampler suggested, where `config` is the repaired form of it.
    """

    config: Config
    slice: SearchSlice
    origin: str
    vector: Config | None = None


@dataclass(frozen=True, eq=False)
class Result:
    """Loss sums and weights, one of each per window of the slice, or a failure."""

    losses: NDArray[np.float64] | None
    weights: NDArray[np.float64] | None
    failure: str | None = None

    @property
    def mean(self) -> float:
        """Loss per weight; inf for a failure or a loss that is not finite."""
        if self.failure is not None or self.losses is None or self.weights is None:
            return float("inf")
        mean = float(self.losses.sum() / self.weights.sum())
        return mean if np.isfinite(mean) else float("inf")


@dataclass(frozen=True)
class Settings:
    """What a solver may spend, and the sizes that it works with.

    Attributes:
        tokens: budget, windows times `window_tokens` summed over all proposals.
        window_tokens: what one window costs.
        windows: length of the full search slice.
        offspring: candidates in a generation or a batch.
        survivors: of each stage of a generation; the last is 1.
        stage_windows: on how much each stage scores; cut to `windows`.
    """

    seed: int
    tokens: int
    window_tokens: int
    windows: int
    offspring: int = 16
    survivors: tuple[int, ...] = (1, 1)
    stage_windows: tuple[int, ...] = (4, 64)

    @property
    def full(self) -> SearchSlice:
        """The full search slice."""
        return SearchSlice(0, self.windows)


class Solver(Protocol):
    """Proposes, is told, and can be continued."""

    def ask(self) -> list[Proposal]:
        """The next proposals; the same ones until they are told; none: finished."""
        ...

    def tell(self, results: list[Result]) -> None:
        """The results of the last `ask`, in its order."""
        ...

    def state(self) -> dict[str, Any]:
        """JSON: what a replay of the told results should not have to compute again."""
        ...


Strategy = Generator[list[Proposal], Sequence[Result], None]


class StrategySolver:
    """Drives a strategy, a generator that yields proposals and is sent their results.

    To resume, build it anew with the same arguments and the stored state, and tell it the stored
    results: a strategy depends on nothing else.
    """

    def __init__(self, strategy: Strategy, answers: dict[str, Any]) -> None:
        """Takes a fresh strategy and the answers that it reads and adds to."""
        self._strategy = strategy
        self._answers = answers
        self._asked: list[Proposal] | None = None

    def ask(self) -> list[Proposal]:
        """See `Solver`."""
        if self._asked is None:
            self._asked = next(self._strategy, [])
        return list(self._asked)

    def tell(self, results: list[Result]) -> None:
        """See `Solver`. Raises ApportionError where the results do not match what was asked."""
        asked = len(self.ask())
        if not asked or len(results) != asked:
            raise ApportionError(f"{asked} results are awaited, {len(results)} were told")
        try:
            self._asked = self._strategy.send(results)
        except StopIteration:
            self._asked = []

    def state(self) -> dict[str, Any]:
        """See `Solver`."""
        return dict(self._answers)
