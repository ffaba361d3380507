"""Repair and mutation keep to the limits and to canonical configurations."""

from dataclasses import replace

import numpy as np

from apportion.search.moves import mutate, relief, repair


def test_repair_leads_to_a_feasible_configuration(synthetic):
    problem, rng = synthetic(0).problem, np.random.default_rng(0)
    for _ in range(50):
        config = repair(problem, tuple(int(rng.integers(n)) for n in problem.count), rng)
        assert config is not None and problem.feasible(config)
        assert problem.canonical(config) == config


def test_repair_without_a_generator_is_a_function(synthetic):
    problem = synthetic(0).problem
    found = repair(problem, problem.neutral_config)
    assert found is not None and problem.feasible(found)
    assert found == repair(problem, problem.neutral_config)


def test_repair_leaves_a_feasible_configuration_alone(synthetic):
    problem = synthetic(0).problem
    config = repair(problem, problem.neutral_config)
    assert repair(problem, config, np.random.default_rng(0)) == config


def test_repair_says_none_where_nothing_is_feasible(synthetic):
    problem = synthetic(0).problem
    problem = replace(problem, limit={"bytes": 1.0})
    assert repair(problem, problem.neutral_config, np.random.default_rng(0)) is None


def test_repair_spares_frozen_sites_while_others_can_do_it(synthetic):
    problem = synthetic(0, limits={"bytes": 0.9}).problem
    frozen = set(range(7))
    config = repair(problem, problem.neutral_config, np.random.default_rng(0), frozen)
    assert config[:7] == problem.neutral_config[:7]


def test_mutate_stays_within_limits_and_reaches_other_sites(synthetic):
    problem, rng = synthetic(0).problem, np.random.default_rng(0)
    parent = repair(problem, problem.neutral_config, rng)
    children = [c for _ in range(200) if (c := mutate(problem, parent, rng)) is not None]
    assert len(children) > 150 and parent not in children
    assert all(problem.feasible(c) and problem.canonical(c) == c for c in children)
    moved = np.any(np.array(children) != np.array(parent), axis=0)
    assert moved[problem.count > 1].all()


def test_relief_is_the_cost_saved_where_nothing_is_limited(synthetic):
    problem = synthetic(0, limits={"bytes": 1.0}).problem
    problem = replace(problem, limit={})
    saved = problem.cost["bytes"][2, 0] - problem.cost["bytes"][2, 3]
    expected = saved / problem.total("bytes", problem.neutral_config)
    assert np.isclose(relief(problem, problem.neutral_config)[2, 3], expected)
