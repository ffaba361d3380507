"""Optuna's samplers behind ask and tell, over a study in memory.

The sampler suggests one category per site; that vector is decoded to the nearest feasible
configuration by `repair`, always the same one. Optuna keeps its own vector, with the loss of the
decoded one.
"""

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from apportion.search.ledger import Ledger
from apportion.search.moves import repair
from apportion.search.problem import Config, Problem
from apportion.search.solver import Proposal, Strategy
from apportion.search.solvers.uniform import uniform

if TYPE_CHECKING:
    import optuna

DRAWS = 20  # suggestions per asked-for configuration, before a batch goes on with fewer


def sampler_strategy(
    ledger: Ledger, problem: Problem, seed: int, make: Callable[[int, int], Any], costs: bool
) -> Strategy:
    """Asks for the whole budget, one batch of `settings.offspring` on the full slice at a time.

    Args:
        make: (seed, batch size) -> sampler; made anew for every batch.
        costs: whether the limited costs are objectives beside the loss.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    kinds = list(problem.scaled_cost) if costs else []
    study = optuna.create_study(
        directions=["minimize"] * (1 + len(kinds)),
        storage=optuna.storages.InMemoryStorage(),
        sampler=optuna.samplers.RandomSampler(seed=seed),
    )
    full, size = ledger.settings.full, ledger.settings.offspring
    yield from uniform(ledger, problem, share=0.25, only_feasible=True)
    for config in ledger.complete():
        _add(study, problem, config, _values(ledger, problem, config, kinds))
    batch = 0
    while ledger.affords(full.windows):
        study.sampler = make(_seed(seed, batch), size)
        batch += 1
        before = ledger.spent
        fresh = _suggest(study, ledger, problem, kinds, min(size, _affordable(ledger)))
        wanted = [Proposal(config, full, _name(costs), vector) for _, config, vector in fresh]
        yield from ledger.measure(wanted)
        for trial, config, _ in fresh:
            _tell(study, trial, _values(ledger, problem, config, kinds))
        if ledger.spent == before:
            return


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


def _name(costs: bool) -> str:
    return "optuna:nsga2" if costs else "optuna:tpe"


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


def _suggest(
    study: "optuna.Study", ledger: Ledger, problem: Problem, kinds: list[str], count: int
) -> list[tuple["optuna.trial.Trial", Config, Config]]:
    """(trial, configuration, vector) not seen before; what is known is told at once."""
    full = ledger.settings.full
    fresh: list[tuple[Any, Config, Config]] = []
    for _ in range(DRAWS * count):
        if len(fresh) == count:
            break
        trial = study.ask(_categories(problem))
        vector = tuple(int(trial.params[f"site{site}"]) for site in range(problem.sites))
        config = repair(problem, vector)
        if config is None:
            _tell(study, trial, None)
        elif ledger.known(config, full) or config in [known for _, known, _ in fresh]:
            _tell(study, trial, _values(ledger, problem, config, kinds))
        else:
            fresh.append((trial, config, vector))
    return fresh


def _values(
    ledger: Ledger, problem: Problem, config: Config, kinds: list[str]
) -> list[float] | None:
    loss = ledger.mean(config)
    if not np.isfinite(loss):
        return None
    return [loss, *(problem.total(kind, config) for kind in kinds)]


def _tell(study: "optuna.Study", trial: "optuna.trial.Trial", values: list[float] | None) -> None:
    import optuna

    if values is None:
        study.tell(trial, state=optuna.trial.TrialState.FAIL)
    else:
        study.tell(trial, values)


def _add(
    study: "optuna.Study", problem: Problem, config: Config, values: list[float] | None
) -> None:
    import optuna

    if values is None:
        return
    params = {f"site{site}": option for site, option in enumerate(config)}
    study.add_trial(
        optuna.create_trial(params=params, distributions=_categories(problem), values=values)
    )
