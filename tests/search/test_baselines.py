"""The loss table, the uniform configurations and the greedy way down."""

from dataclasses import replace

import numpy as np

from apportion.search.solver import Proposal, Result, SearchSlice, Settings
from apportion.search.solvers import make_solver
from apportion.search.solvers.greedy import descend, improve
from apportion.search.solvers.ladder import spread
from apportion.search.solvers.score import loss_table, score_slice, unscored, with_loss
from apportion.search.solvers.uniform import drop_variants, sub_blocks

SETTINGS = Settings(seed=0, tokens=40_000, window_tokens=8, windows=32)


def scored(world):
    """The problem with the loss table that its score proposals give."""
    log = []
    solver = make_solver("greedy", world.problem, SETTINGS)
    log = [(p, world.result(p)) for p in solver.ask()]
    return with_loss(world.problem, loss_table(world.problem, log)), log


def test_score_asks_each_option_alone_on_one_slice(synthetic):
    world = synthetic(0)
    _, log = scored(world)
    changed = [np.flatnonzero(np.asarray(p.config) != world.problem.neutral) for p, _ in log]
    assert sorted(len(c) for c in changed)[:2] == [0, 1] and max(len(c) for c in changed) == 1
    assert len(log) == len(unscored(world.problem)) + 1
    assert len({p.slice for p, _ in log}) == 1


def test_score_slice_keeps_the_share():
    settings = Settings(seed=0, tokens=1_000_000, window_tokens=128, windows=64)
    assert score_slice(settings, 300) == SearchSlice(0, 8)
    assert score_slice(settings, 10**6) == SearchSlice(0, 1)
    assert score_slice(settings, 10) == SearchSlice(0, 64)


def test_loss_table_is_the_difference_to_neutral(synthetic):
    problem, part, ones = synthetic(0).problem, SearchSlice(0, 2), np.ones(2)
    neutral, one = problem.neutral_config, (0, 0, 3, *problem.neutral_config[3:])
    log = [
        (Proposal(neutral, part, "score"), Result(ones * 5, ones)),
        (Proposal(one, part, "score"), Result(ones * 7, ones)),
    ]
    table = loss_table(problem, log)
    assert table[2, 3] == 2.0 and table[2, 0] == 0.0 and np.isnan(table[2, 2])


def test_loss_table_of_a_failure_bars_the_option(synthetic):
    world = synthetic(0)
    world.fails = lambda config: config[2] == 3
    problem, _ = scored(world)
    assert np.isposinf(problem.loss[2, 3]) and not problem.present[2, 3]
    assert not unscored(problem)


def test_sub_blocks_void_no_other_drop(synthetic):
    problem = synthetic(0, blocks=2).problem
    assert sub_blocks(problem) == [(1, 1), (4, 1), (8, 1), (11, 1)]


def test_drop_variants_drop_the_least_first(synthetic):
    problem, _ = scored(synthetic(0, blocks=3))
    cheap = min((site for site, _ in sub_blocks(problem)), key=lambda s: problem.loss[s, 1])
    variants = drop_variants(problem, problem.uniform["o2"])
    assert [sum(c[s] for s, _ in sub_blocks(problem)) for c in variants] == [1, 2, 3, 4]
    assert variants[0][cheap] == 1 and problem.void(variants[0]).sum() == 2


def test_drop_variants_drop_each_the_way_of_its_least_loss(synthetic):
    problem, _ = scored(synthetic(0, blocks=2))
    plain = drop_variants(problem, problem.uniform["o2"])
    sites = [site for site, _ in sub_blocks(problem)]
    # A second way to drop every sub-block, that loses less at the first of them alone.
    loss, drops, count = problem.loss.copy(), problem.drops.copy(), problem.count.copy()
    loss[sites, 2], drops[sites, 2], count[sites] = loss[sites, 1] + 1, True, 3
    loss[sites[0], 2] = loss[sites, 1].min() - 1
    cost = {kind: np.where(np.isfinite(row), row, 0.0) for kind, row in problem.cost.items()}
    problem = replace(problem, loss=loss, drops=drops, removes=drops, count=count, cost=cost)
    assert sub_blocks(problem) == [(site, option) for site in sites for option in (1, 2)]
    variants = drop_variants(problem, problem.uniform["o2"])
    assert len(variants) == len(plain) == 4
    assert variants[0][sites[0]] == 2
    assert [variants[3][site] for site in sites] == [2, 1, 1, 1]


def test_uniform_scores_every_option_and_the_best_drop(synthetic, drive):
    world = synthetic(0, limits={"bytes": 1.0})
    log = drive(make_solver("uniform", world.problem, SETTINGS), world)
    full = [p.origin for p, _ in log if p.slice == SETTINGS.full]
    assert {"uniform:o1", "uniform:o2", "uniform:o3", "uniform:o4"} <= set(full)
    assert sum("-drop" in origin for origin in full) == 4
    short = [p for p, _ in log if p.slice == SearchSlice(0, 4)]
    assert len([p for p in short if "-drop" in p.origin]) == 16


def test_descend_ends_feasible_and_improve_never_loses(synthetic):
    for seed in range(5):
        problem, _ = scored(synthetic(seed))
        path = descend(problem)
        better = improve(problem, path[-1])
        assert problem.feasible(path[-1]) and problem.feasible(better)
        assert not any(problem.feasible(config) for config in path[:-1])
        assert problem.additive_loss(better) <= problem.additive_loss(path[-1])


def test_descend_without_limits_goes_down_to_the_cheapest(synthetic):
    problem, _ = scored(synthetic(0, limits={"bytes": 1.0}))
    path = descend(replace(problem, limit={}))
    totals = [problem.total("bytes", config) for config in path]
    assert totals == sorted(totals, reverse=True)
    assert totals[-1] == problem.base["bytes"]


def test_spread_takes_coarse_grids_first():
    assert spread(8)[:5] == [0.0, 1.0, 0.5, 0.25, 0.75]
    assert sorted(spread(16)) == [i / 16 for i in range(17)]
