"""Void sites, totals and single switches, against definitions that walk the tree."""

import numpy as np
import pytest

from apportion.errors import ApportionError
from apportion.search.problem import Problem


def random_config(problem, rng):
    return tuple(int(rng.integers(n)) for n in problem.count)


def void_by_walking(problem, config, site):
    above = int(problem.parent[site])
    return above >= 0 and (
        problem.drops[above, config[above]] or void_by_walking(problem, config, above)
    )


def test_void_is_what_some_ancestor_drops(synthetic):
    problem, rng = synthetic(0).problem, np.random.default_rng(1)
    for _ in range(200):
        config = random_config(problem, rng)
        expected = [void_by_walking(problem, config, s) for s in range(problem.sites)]
        assert problem.void(config).tolist() == expected


def test_canonical_keeps_every_total(synthetic):
    problem, rng = synthetic(0).problem, np.random.default_rng(2)
    for _ in range(100):
        config = random_config(problem, rng)
        canonical = problem.canonical(config)
        assert problem.canonical(canonical) == canonical
        assert all(problem.total(k, config) == problem.total(k, canonical) for k in problem.cost)


def test_change_equals_the_difference_of_totals(synthetic):
    problem, rng = synthetic(3).problem, np.random.default_rng(3)
    for _ in range(20):
        config = problem.canonical(random_config(problem, rng))
        change = problem.change(problem.cost["bytes"], config)
        void = problem.void(config)
        for site, option in np.argwhere(problem.present):
            other = problem.canonical((*config[:site], int(option), *config[site + 1 :]))
            expected = problem.total("bytes", other) - problem.total("bytes", config)
            assert np.isclose(change[site, option], np.inf if void[site] else expected)


def test_additive_clips_negative_and_bars_unknown_losses():
    loss = np.array([[0.0, -0.1, np.nan, np.inf]])
    cost = {"bytes": np.array([[4.0, 3.0, 2.0, 1.0]])}
    index = np.zeros(1, dtype=np.int64)
    problem = Problem(
        loss, cost, {}, {}, index - 1, index, np.zeros((1, 4), dtype=bool), index + 4, {}
    )
    assert problem.additive.tolist() == [[0.0, 0.0, np.inf, np.inf]]
    assert problem.present.tolist() == [[True, True, True, False]]


def test_levels_refuses_a_cycle(synthetic):
    problem = synthetic(0).problem
    problem.parent[0] = 1
    with pytest.raises(ApportionError, match="cycle"):
        _ = problem.levels
