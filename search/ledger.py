"""What a strategy has asked, what it was told, and what it may still spend."""

from collections.abc import Generator, Iterable, Sequence

import numpy as np

from apportion.search.problem import Config, Floats, Problem
from apportion.search.solver import Proposal, Result, SearchSlice, Settings

Measuring = Generator[list[Proposal], Sequence[Result], None]


class Ledger:
    """Proposes nothing twice and never spends more than the budget.

    Losses are kept per window, so what was scored on a slice is known on every part of it.
    A configuration that failed once has failed.
    """

    def __init__(self, problem: Problem, settings: Settings) -> None:
        """Starts with nothing spent."""
        self.problem = problem
        self.settings = settings
        self.spent = 0
        self.results: dict[tuple[Config, SearchSlice], Result] = {}
        self._losses: dict[Config, tuple[Floats, Floats]] = {}
        self._failed: set[Config] = set()

    def price(self, windows: int) -> int:
        """Tokens of one configuration on so many windows."""
        return windows * self.settings.window_tokens

    def affords(self, windows: int) -> bool:
        """Whether so many windows can still be paid for."""
        return self.spent + self.price(windows) <= self.settings.tokens

    def measure(self, wanted: Iterable[Proposal], until: int | None = None) -> Measuring:
        """Proposes what is not known yet, in order, as far as the tokens reach.

        Args:
            wanted: configurations in any form; they are made canonical.
            until: a mark of tokens spent in all at which to stop; the whole budget where absent.
        """
        until = self.settings.tokens if until is None else min(until, self.settings.tokens)
        batch: dict[tuple[Config, SearchSlice], Proposal] = {}
        for one in wanted:
            config = self.problem.canonical(one.config)
            key = (config, one.slice)
            if key in batch or self.known(config, one.slice):
                continue
            if self.spent + self.price(one.slice.windows) > until:
                break
            self.spent += self.price(one.slice.windows)
            batch[key] = Proposal(config, one.slice, one.origin, one.vector)
        if batch:
            results = yield list(batch.values())
            for (config, part), result in zip(batch, results, strict=True):
                self.record(config, part, result)

    def known(self, config: Config, part: SearchSlice) -> bool:
        """Whether the loss needs no asking.

        The full slice counts only as one trial: the front is made of those.
        """
        if config in self._failed or (config, part) in self.results:
            return True
        if part == self.settings.full or config not in self._losses:
            return False
        return bool(np.isfinite(self._losses[config][0][part.first : part.stop]).all())

    def tried(self, config: Config) -> bool:
        """Whether anything is known of it."""
        return config in self._losses or config in self._failed

    def mean(self, config: Config, part: SearchSlice | None = None) -> float:
        """Loss on a slice (default: the full one); inf where it failed or is not known."""
        part = part or self.settings.full
        if config in self._failed or not self.known(config, part):
            return float("inf")
        return self.result(config, part).mean

    def result(self, config: Config, part: SearchSlice) -> Result:
        """Losses and weights on a part that is `known`."""
        if config in self._failed:
            return Result(None, None, "failed before")
        losses, weights = self._losses[config]
        return Result(losses[part.first : part.stop], weights[part.first : part.stop])

    def complete(self) -> list[Config]:
        """Configurations scored on the full slice, in the order they were told."""
        full = self.settings.full
        return [c for c, part in self.results if part == full and c not in self._failed]

    def best(self) -> Config | None:
        """The feasible configuration of least loss on the full slice."""
        known = [config for config in self.complete() if self.problem.feasible(config)]
        return min(known, key=self.mean, default=None)

    def record(self, config: Config, part: SearchSlice, result: Result) -> None:
        """Take what was told of a canonical configuration."""
        self.results[config, part] = result
        if not np.isfinite(result.mean) or result.losses is None or result.weights is None:
            self._failed.add(config)
            return
        if config not in self._losses:
            unknown = np.full(self.settings.windows, np.nan)
            self._losses[config] = (unknown, unknown.copy())
        losses, weights = self._losses[config]
        losses[part.first : part.stop] = result.losses
        weights[part.first : part.stop] = result.weights
