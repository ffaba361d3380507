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
from apportion.search.solvers.starting import begun
from apportion.search.solvers.uniform import uniform_strategy


def _memory(ledger: Ledger, answers: dict[str, Any]) -> Memory:
    seed = ledger.settings.seed
    return Memory(answers, np.random.default_rng(np.random.SeedSequence(seed)))


SOLVERS: dict[str, Callable[[Ledger, dict[str, Any]], Strategy]] = {
    "hybrid": lambda ledger, answers: Hybrid(
        ledger, ledger.problem, Exact(ledger.problem, answers), _memory(ledger, answers)
    ).strategy(),
    "ilp": lambda ledger, answers: ilp_strategy(
        ledger, ledger.problem, Exact(ledger.problem, answers)
    ),
    "greedy": lambda ledger, _: greedy_strategy(ledger, ledger.problem),
    "evopress": lambda ledger, answers: evopress_strategy(
        ledger, ledger.problem, _memory(ledger, answers)
    ),
    "optuna:nsga2": lambda ledger, answers: Sampling(
        ledger, ledger.problem, _memory(ledger, answers), nsga2, costs=True
    ).strategy(),
    "optuna:tpe": lambda ledger, answers: Sampling(
        ledger, ledger.problem, _memory(ledger, answers), tpe, costs=False
    ).strategy(),
    "uniform": lambda ledger, _: uniform_strategy(ledger, ledger.problem),
}


def make_solver(
    name: str, problem: Problem, settings: Settings, state: dict[str, Any] | None = None
) -> Solver:
    """The solver of that name; `state` is what an earlier one's `state()` returned.

    All of them begin with the problem's start configurations.
    Raises InvalidInput for a name that is not known.
    """
    if name not in SOLVERS:
        raise InvalidInput(f'there is no solver "{name}"; known are {", ".join(SOLVERS)}')
    answers = dict(state or {})
    ledger = Ledger(problem, settings)
    return StrategySolver(begun(ledger, SOLVERS[name](ledger, answers)), answers)
