"""The whole front, where limits do not bind, and the loss table that it stands on."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from apportion.search.ledger import Ledger
from apportion.search.solver import SearchSlice, Settings
from apportion.search.solvers import make_solver
from apportion.search.solvers.exact import Exact
from apportion.search.solvers.frontier import Attainment
from apportion.search.solvers.score import paired_loss, refine, score, scored_windows

SETTINGS = Settings(seed=1, tokens=6_000, window_tokens=8, windows=16, offspring=8)
LOOSE = {"bytes": 1.0, "latency": 1.0}
points = st.lists(st.tuples(*[st.integers(1, 9)] * 2, st.floats(1e-3, 10)), min_size=1, max_size=6)


def attainment(limits, loss, least=1e-2, most=1.0):
    return Attainment(np.array(limits, dtype=float), np.array(loss, dtype=float), least, most)


@given(limits=st.lists(st.tuples(*[st.integers(1, 9)] * 2), min_size=1, max_size=8), known=points)
def test_attainment_is_the_least_loss_within_each_limit(limits, known):
    costs, losses = np.array([p[:2] for p in known], dtype=float), np.array([p[2] for p in known])
    nothing = attainment(limits, np.ones(len(limits)))
    found = nothing.joined(costs, losses)
    for place, limit in enumerate(limits):
        within = [loss for *cost, loss in known if all(np.array(cost) <= limit)]
        assert found.loss[place] == np.clip(min(within, default=1.0), 1e-2, 1.0)
    gains = nothing.gains(costs, losses)
    one_by_one = [
        nothing.joined(c[None], np.array([x])) for c, x in zip(costs, losses, strict=True)
    ]
    expected = [np.sum(np.log(nothing.loss) - np.log(one.loss)) for one in one_by_one]
    assert gains == pytest.approx(expected)


def test_what_is_already_attained_gains_nothing():
    known = attainment([[2, 2], [5, 5]], [0.5, 0.1])
    costs = np.array([[2, 2], [3, 3], [6, 1]], dtype=float)
    assert known.gains(costs, np.array([0.5, 0.1, 1e-3])).tolist() == [0, 0, 0]


def told(world, generator):
    """What a strategy returns at its end, and all that it proposed."""
    log, results = [], None
    while True:
        try:
            proposals = generator.send(results)
        except StopIteration as end:
            return end.value, log
        results = [world.result(proposal) for proposal in proposals]
        log += proposals


def test_refined_table_scores_again_what_its_answers_choose_and_nothing_else(synthetic):
    world = synthetic(4, blocks=2)
    ledger = Ledger(world.problem, SETTINGS)
    problem, _ = told(world, score(ledger, world.problem, share=0.05))
    exact = Exact(problem, {})
    spent = ledger.spent

    def answers(current):
        return [exact.solve(current.additive)]

    refined, log = told(world, refine(ledger, problem, answers, spent + 3_000))
    assert log and all(p.origin == "score" for p in log)
    assert ledger.spent <= spent + 3_000
    last = exact.solve(refined.additive)
    chosen = [(s, o) for s, o in enumerate(last) if o != problem.neutral[s]]
    half = SETTINGS.windows // 2
    assert all(scored_windows(ledger, refined, s, o) == half for s, o in chosen)
    untouched = refined.present & (refined.loss == problem.loss)
    assert untouched.sum() > len(chosen)
    for s, o in chosen:
        windows = (world.windows[:half] * world.moves[s, o]) ** 2
        assert refined.loss[s, o] == pytest.approx(windows.sum() / half)
        assert paired_loss(ledger, refined, s, o) == refined.loss[s, o]


def test_refining_ends_with_its_tokens(synthetic):
    world = synthetic(4, blocks=2)
    ledger = Ledger(world.problem, SETTINGS)
    problem, _ = told(world, score(ledger, world.problem, share=0.05))
    spent = ledger.spent
    answers = Exact(problem, {})
    same, log = told(world, refine(ledger, problem, lambda p: [answers.solve(p.additive)], spent))
    assert same is problem and not log and ledger.spent == spent


def test_scored_windows_counts_from_the_first_window_on(synthetic):
    world = synthetic(4, blocks=2)
    ledger, problem = Ledger(world.problem, SETTINGS), world.problem
    config = (0, 0, 3, *problem.neutral_config[3:])
    for part in (SearchSlice(2, 2), SearchSlice(0, 2)):
        assert scored_windows(ledger, problem, 2, 3) == 0
        telling = ledger.measure([told_of(config, part)])
        results = [world.result(p) for p in next(telling)]
        with pytest.raises(StopIteration):
            telling.send(results)
    assert scored_windows(ledger, problem, 2, 3) == 4


def told_of(config, part):
    from apportion.search.solver import Proposal

    return Proposal(config, part, "score")


def hypervolume(world, log):
    """Of log loss over scaled costs, on a grid of limits; larger is better."""
    full = [p.config for p, r in log if p.slice == SETTINGS.full and not r.failure]
    dense = [world.problem.total(kind, world.problem.neutral_config) for kind in LOOSE]
    costs = np.array([[world.problem.total(k, c) for k in LOOSE] for c in full]) / dense
    losses = np.array([world.loss(config) for config in full])
    grid = np.stack(np.meshgrid(*[np.linspace(0.3, 1, 40)] * 2), axis=-1).reshape(-1, 2)
    worst = attainment(grid, np.full(len(grid), 10.0), least=1e-4, most=10.0)
    return (
        worst.gains(costs[:0], losses[:0]).sum()
        + np.log(worst.loss / worst.joined(costs, losses).loss).mean()
    )


@pytest.mark.parametrize("seed", range(2))
def test_without_binding_limits_the_front_is_better_than_the_ladders(seed, synthetic, drive):
    world = synthetic(seed, blocks=2, limits=LOOSE)
    ours, ladder = (
        hypervolume(world, drive(make_solver(name, world.problem, SETTINGS), world))
        for name in ("hybrid", "ilp")
    )
    assert ours > ladder


def test_points_of_an_additive_world_are_exact_answers(synthetic, drive):
    """No interactions, no differences between windows: then the table is all there is to know."""
    world = synthetic(3, blocks=2, dimensions=4096, limits=LOOSE)
    world.windows[:] = 1.0
    log = drive(make_solver("hybrid", world.problem, SETTINGS), world)
    table = np.where(world.problem.present, (world.moves**2).sum(axis=2), np.inf)
    exact = Exact(world.problem, {})
    points = [p.config for p, _ in log if p.origin.startswith("hybrid:front")]
    assert len(points) > 8
    for config in points:
        costs = {kind: world.problem.total(kind, config) for kind in LOOSE}
        best = exact.solve(table, costs)
        assert world.loss(config) <= 1.05 * world.loss(best)


def test_front_is_searched_where_nothing_is_limited(synthetic, drive):
    world = synthetic(1, blocks=2)
    world.problem = replace(world.problem, limit={})
    log = drive(make_solver("hybrid", world.problem, SETTINGS), world)
    assert sum(p.origin.startswith("hybrid:front") for p, _ in log) > 8


def test_best_is_searched_where_the_neutral_configuration_may_be_beaten(synthetic, drive):
    """A cross-entropy is no divergence: another choice may lose less than the neutral one."""
    world = synthetic(1, blocks=2, limits=LOOSE)
    result, neutral = world.result, world.problem.neutral_config

    def shifted(proposal):
        told = result(proposal)
        return replace(told, losses=told.losses + 1.0)

    world.result = shifted
    log = drive(make_solver("hybrid", world.problem, SETTINGS), world)
    assert log[0][0].config == neutral and log[0][0].slice == SETTINGS.full
    origins = {p.origin.partition(":")[2] for p, _ in log if p.origin.startswith("hybrid:b")}
    assert any(origin.endswith("mutant") for origin in origins)
    assert not any(p.origin.startswith("hybrid:front") for p, _ in log)


def test_front_without_uniform_configurations_begins_with_the_ladder(synthetic, drive):
    world = synthetic(1, blocks=2, limits=LOOSE)
    world.problem = replace(world.problem, uniform={}, drops=np.zeros_like(world.problem.drops))
    log = drive(make_solver("hybrid", world.problem, SETTINGS), world)
    assert any(p.origin.startswith("ilp") for p, _ in log)
    assert any(p.origin.startswith("hybrid:front") for p, _ in log)
