"""Optuna's samplers behind ask and tell, over a study in memory.

The sampler suggests one category per site; that vector is decoded to the nearest feasible
configuration by `repair`, always the same one. Optuna keeps its own vector, with the loss of the
decoded one. What a sampler drew is remembered batch by batch: a replay gives Optuna the same trials
without drawing again, which would read the whole history for each.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from apportion.search.ledger import Ledger
from apportion.search.memory import Difference, Memory, applied, differences
from apportion.search.moves import repair
from apportion.search.problem import Config, Problem
from apportion.search.solver import Proposal, Strategy
from apportion.search.solvers.uniform import uniform

if TYPE_CHECKING:
    import optuna

DRAWS = 20  # suggestions per asked-for configuration, before a batch goes on with fewer


@dataclass(frozen=True)
class Drawn:
    """A trial of Optuna's, told of or not.

    Attributes:
        vector: what the sampler suggested.
        config: the nearest feasible configuration; None: none is near.
        attributes: what the sampler has written on it.
    """

    vector: Config
    config: Config | None
    attributes: dict[str, Any]


class Sampling:
    """One sampler's study, and the ledger that pays for what it suggests."""

    def __init__(
        self,
        ledger: Ledger,
        problem: Problem,
        memory: Memory,
        make: Callable[[int, int], Any],
        costs: bool,
    ) -> None:
        """Takes its parts.

        Args:
            ledger: pays.
            problem: what is searched.
            memory: what another run has drawn.
            make: (seed, batch size) -> sampler; made anew for every batch.
            costs: whether the limited costs are objectives beside the loss.
        """
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._ledger, self._problem, self._memory = ledger, problem, memory
        self._make = make
        self._kinds = list(problem.scaled_cost) if costs else []
        self._name = "optuna:nsga2" if costs else "optuna:tpe"
        self._categories = _categories(problem)
        self._storage = optuna.storages.InMemoryStorage()
        self._study = optuna.create_study(
            directions=["minimize"] * (1 + len(self._kinds)), storage=self._storage
        )
        self._id = self._storage.get_study_id_from_name(self._study.study_name)
        # place in the batch -> trial to be told of; None where another run has drawn the batch
        self._running: dict[int, optuna.trial.Trial] | None = None

    def strategy(self) -> Strategy:
        """Uniform configurations, then batch after batch of what the sampler suggests."""
        ledger, full = self._ledger, self._ledger.settings.full
        yield from uniform(ledger, self._problem, share=0.25, only_feasible=True)
        # What the sampler suggests is made feasible: a loss outside the limits would mislead it.
        for config in filter(self._problem.feasible, ledger.complete()):
            self._add(Drawn(config, config, {}))
        batch = 0
        while ledger.affords(full.windows):
            before, drawn = ledger.spent, self._batch(batch)
            batch += 1
            wanted = [Proposal(d.config, full, self._name, d.vector) for d in drawn if d.config]
            yield from ledger.measure(wanted)
            self._settle(drawn)
            if ledger.spent == before:
                return

    def _batch(self, number: int) -> list[Drawn]:
        """What the sampler suggests, in the order of drawing: now, or when it was first asked."""
        parents = self._storage.get_study_system_attrs(self._id)

        def compute() -> list[Any]:
            settings = self._ledger.settings
            self._study.sampler = self._make(_seed(settings.seed, number), settings.offspring)
            drawn = self._draw(min(settings.offspring, _affordable(self._ledger)))
            now = self._storage.get_study_system_attrs(self._id)
            return [
                [[d.vector, _changes(d), d.attributes] for d in drawn],
                {key: value for key, value in now.items() if key not in parents},
            ]

        drawn, shared = self._memory.recall(f"{self._name}:{number}", compute)
        for key, value in shared.items():
            self._storage.set_study_system_attr(self._id, key, value)
        return [
            Drawn(tuple(vector), None if found is None else applied(tuple(vector), found), wrote)
            for vector, found, wrote in drawn
        ]

    def _draw(self, count: int) -> list[Drawn]:
        """Suggestions until `count` of them are new; what is known is told at once."""
        full, new, drawn = self._ledger.settings.full, set[Config](), list[Drawn]()
        self._running = {}
        for _ in range(DRAWS * count):
            if len(new) == count:
                break
            trial = self._study.ask(self._categories)
            vector = tuple(int(trial.params[f"site{s}"]) for s in range(self._problem.sites))
            config = repair(self._problem, vector)
            place = self._storage.get_trial_id_from_study_id_trial_number(self._id, trial.number)
            drawn.append(Drawn(vector, config, self._storage.get_trial(place).system_attrs))
            if config is None or self._ledger.known(config, full):
                self._tell(trial, config)
            else:
                new.add(config)
                self._running[len(drawn) - 1] = trial
        return drawn

    def _settle(self, drawn: Sequence[Drawn]) -> None:
        """Tell what was measured; where another run drew it, add all that was drawn."""
        if self._running is None:
            for one in drawn:
                self._add(one)
            return
        for place, trial in self._running.items():
            self._tell(trial, drawn[place].config)
        self._running = None

    def _values(self, config: Config | None) -> list[float] | None:
        if config is None or not np.isfinite(loss := self._ledger.mean(config)):
            return None
        return [loss, *(self._problem.total(kind, config) for kind in self._kinds)]

    def _tell(self, trial: "optuna.trial.Trial", config: Config | None) -> None:
        import optuna

        values = self._values(config)
        failed = optuna.trial.TrialState.FAIL if values is None else None
        self._study.tell(trial, values, state=failed)

    def _add(self, drawn: Drawn) -> None:
        import optuna

        states, values = optuna.trial.TrialState, self._values(drawn.config)
        self._study.add_trial(
            optuna.create_trial(
                state=states.FAIL if values is None else states.COMPLETE,
                values=values,
                params={f"site{site}": option for site, option in enumerate(drawn.vector)},
                distributions=self._categories,
                system_attrs=drawn.attributes,
            )
        )


def nsga2(seed: int, population: int) -> "optuna.samplers.BaseSampler":
    """NSGA-II with a population of one batch."""
    import optuna

    return optuna.samplers.NSGAIISampler(seed=seed, population_size=max(2, population))


def tpe(seed: int, startup: int) -> "optuna.samplers.BaseSampler":
    """Multivariate TPE, random for the first batch."""
    import optuna

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.samplers.TPESampler(seed=seed, multivariate=True, n_startup_trials=startup)


def _changes(drawn: Drawn) -> Difference | None:
    return None if drawn.config is None else differences(drawn.vector, [drawn.config])[0]


def _seed(seed: int, batch: int) -> int:
    return int(np.random.SeedSequence([seed, batch]).generate_state(1)[0])


def _affordable(ledger: Ledger) -> int:
    left = ledger.settings.tokens - ledger.spent
    return left // ledger.price(ledger.settings.windows)


def _categories(problem: Problem) -> dict[str, "optuna.distributions.BaseDistribution"]:
    import optuna

    return {
        f"site{site}": optuna.distributions.CategoricalDistribution(
            np.flatnonzero(present).tolist()
        )
        for site, present in enumerate(problem.present)
    }
