"""The integer program against enumeration."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from apportion.search.problem import Problem
from apportion.search.solvers.exact import Exact, infeasibility


def small_problem(rng, sites=4, options=3):
    """Integers with many ties, a random forest, and limits that some configurations meet."""
    parent = np.array([int(rng.integers(-1, s)) if s else -1 for s in range(sites)])
    drops = (rng.random((sites, 1)) < 0.5) & (np.arange(options) == 1)
    count = rng.integers(2, options + 1, sites)
    padding = np.arange(options) >= count[:, None]
    loss = rng.integers(0, 4, (sites, options)).astype(float)
    loss[:, 0] = 0.0
    cost = {k: rng.integers(0, 6, (sites, options)).astype(float) for k in ("bytes", "latency")}
    for values in (loss, *cost.values()):
        values[padding] = np.inf
    limit = {kind: float(rng.integers(4, 14)) for kind in cost}
    neutral = np.zeros(sites, dtype=np.int64)
    return Problem(loss, cost, {"bytes": 2.0}, limit, parent, neutral, drops, count, {})


def configurations(problem):
    every = itertools.product(*(range(n) for n in problem.count))
    return sorted({problem.canonical(config) for config in every})


def relative_cost(problem, config):
    return sum(problem.total(k, config) / limit for k, limit in problem.limit.items())


@pytest.mark.parametrize("seed", range(6))
def test_solve_equals_enumeration(seed):
    rng = np.random.default_rng(seed)
    for _ in range(300):
        problem = small_problem(rng)
        allowed = [c for c in configurations(problem) if problem.feasible(c)]
        found = Exact(problem, {}).solve(problem.additive)
        if not allowed:
            assert found is None
            continue
        best = min((problem.additive_loss(c), relative_cost(problem, c)) for c in allowed)
        assert found in allowed
        assert (problem.additive_loss(found), relative_cost(problem, found)) == pytest.approx(best)


def test_infeasibility_equals_enumeration():
    rng, reports = np.random.default_rng(0), 0
    for _ in range(150):
        problem = small_problem(rng)
        every = configurations(problem)
        report = infeasibility(problem)
        assert (report is None) == any(problem.feasible(c) for c in every)
        if report is not None:
            reports += 1
            limits = problem.limit.items()
            worst = [max(problem.total(k, c) / limit for k, limit in limits) for c in every]
            assert report.factor == pytest.approx(min(worst))
            for kind in problem.limit:
                least = min(problem.total(kind, c) for c in every)
                assert report.minimum[kind] == pytest.approx(least)
    assert reports > 10


def test_solve_keeps_a_limit_that_is_met_exactly():
    rng = np.random.default_rng(0)
    for _ in range(30):
        problem = small_problem(rng)
        config = configurations(problem)[-1]
        thirds = {k: cost / 3 for k, cost in problem.cost.items()}
        tight = replace(problem, cost=thirds, base={})
        tight = replace(tight, limit={k: tight.total(k, config) for k in thirds})
        found = Exact(tight, {}).solve(tight.additive)
        assert found is not None and tight.feasible(found)
        assert tight.additive_loss(found) <= tight.additive_loss(config)


def test_solve_away_from_configurations_differs_by_the_distance(synthetic):
    problem = synthetic(0, limits={"bytes": 0.5}).problem
    table = np.where(problem.present, np.arange(problem.loss.shape[1]), np.inf)
    exact, found = Exact(problem, {}), []
    for _ in range(4):
        found.append(exact.solve(table, avoid=found, distance=3))
    for old, new in itertools.combinations(found, 2):
        anew = (np.array(old) != np.array(new)) | problem.void(new)
        assert anew[~problem.void(old)].sum() >= 3


def test_solve_takes_a_stored_answer():
    problem = small_problem(np.random.default_rng(1))
    answers: dict = {}
    assert Exact(problem, answers).solve(problem.additive) is not None
    (key,) = answers
    answers[key] = [0, 0, 0, 0]
    assert Exact(problem, answers).solve(problem.additive) == (0, 0, 0, 0)
