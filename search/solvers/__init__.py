"""The solvers by name."""

from collections.abc import Callable
from typing import Any

import numpy as np

from apportion.errors import InvalidInput
from apportion.search.ledger import Ledger
from apportion.search.memory import Memory
from apportion.search.problem import Problem
from apportion.search.solver import Settings, Solver, Strategy, StrategySolver
from apportion.search.solvers.evolutionary import evopress_strategy
from apportion.search.solvers.exact import Exact
from apportion.search.solvers.greedy import greedy_strategy
from apportion.search.solvers.hybrid import Hybrid
from apportion.search.solvers.ladder import ilp_strategy
from apportion.search.solvers.samplers import Sampling, nsga2, tpe
from apportion.search.solvers.uniform import uniform_strategy


def _memory(settings: Settings, answers: dict[str, Any]) -> Memory:
    return Memory(answers, np.random.default_rng(np.random.SeedSequence(settings.seed)))


SOLVERS: dict[str, Callable[[Problem, Settings, dict[str, Any]], Strategy]] = {
    "hybrid": lambda problem, settings, answers: Hybrid(
        Ledger(problem, settings), problem, Exact(problem, answers), _memory(settings, answers)
    ).strategy(),
    "ilp": lambda problem, settings, answers: ilp_strategy(
        Ledger(problem, settings), problem, Exact(problem, answers)
    ),
    "greedy": lambda problem, settings, _: greedy_strategy(Ledger(problem, settings), problem),
    "evopress": lambda problem, settings, answers: evopress_strategy(
        Ledger(problem, settings), problem, _memory(settings, answers)
    ),
    "optuna:nsga2": lambda problem, settings, answers: Sampling(
        Ledger(problem, settings), problem, _memory(settings, answers), nsga2, costs=True
    ).strategy(),
    "optuna:tpe": lambda problem, settings, answers: Sampling(
        Ledger(problem, settings), problem, _memory(settings, answers), tpe, costs=False
    ).strategy(),
    "uniform": lambda problem, settings, _: uniform_strategy(Ledger(problem, settings), problem),
}


def make_solver(
    name: str, problem: Problem, settings: Settings, state: dict[str, Any] | None = None
) -> Solver:
    """The solver of that name; `state` is what an earlier one's `state()` returned.

    Raises InvalidInput for a name that is not known.
    """
    if name not in SOLVERS:
        raise InvalidInput(f'there is no solver "{name}"; known are {", ".join(SOLVERS)}')
    answers = dict(state or {})
    return StrategySolver(SOLVERS[name](problem, settings, answers), answers)
