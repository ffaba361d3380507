"""Start configurations: scored first by every solver, once each, within the budget."""

from dataclasses import replace

import numpy as np
import pytest

from apportion.search.moves import repair
from apportion.search.solver import Settings
from apportion.search.solvers import SOLVERS, make_solver

SETTINGS = Settings(
    seed=3, tokens=5_000, window_tokens=8, windows=16, offspring=8, stage_windows=(2, 16)
)


def drawn(problem, seed, feasible=True):
    """A canonical configuration that is not uniform, within the limits or outside of them."""
    rng = np.random.default_rng(seed)
    while True:
        options = rng.integers(problem.count) if feasible else rng.integers(2, size=problem.sites)
        options[problem.drops.any(axis=1)] = 0
        config = repair(problem, tuple(options.tolist())) if feasible else tuple(options.tolist())
        if config is not None and problem.feasible(config) == feasible:
            return problem.canonical(config)


def starting_from(world, *starts):
    world.problem = replace(world.problem, start=starts)
    return world


@pytest.mark.parametrize("name", SOLVERS)
def test_solver_begins_with_the_start_configurations_in_order(name, synthetic, drive):
    world = synthetic(1)
    good, outside = drawn(world.problem, 0), drawn(world.problem, 1, feasible=False)
    starting_from(world, ("start:outside", outside), ("start:good", good))
    solver = make_solver(name, world.problem, SETTINGS)
    first = solver.ask()
    assert [(p.config, p.origin, p.slice) for p in first] == [
        (outside, "start:outside", SETTINGS.full),
        (good, "start:good", SETTINGS.full),
    ]
    log = drive(solver, world)
    assert len(log) > 2 and sum(p.slice.windows for p, _ in log) * 8 <= SETTINGS.tokens


@pytest.mark.parametrize("name", SOLVERS)
def test_nothing_of_a_start_is_asked_for_again(name, synthetic, drive):
    world = synthetic(1)
    alone = list(world.problem.neutral_config)
    alone[2] = 3
    under_a_drop = [0, 1, 2, *world.problem.neutral_config[3:]]
    canonical = world.problem.canonical(tuple(under_a_drop))
    uniform = world.problem.uniform["o2"]
    starting_from(
        world,
        ("start:alone", tuple(alone)),
        ("start:dropped", tuple(under_a_drop)),
        ("start:the same", canonical),
        ("start:uniform", uniform),
    )
    log = drive(make_solver(name, world.problem, SETTINGS), world)
    origins = [p.origin for p, _ in log]
    assert origins[:3] == ["start:alone", "start:dropped", "uniform:o2"]
    for config in (tuple(alone), canonical, uniform):
        slices = [p.slice for p, _ in log if p.config == config]
        assert slices == [SETTINGS.full]


@pytest.mark.parametrize("name", SOLVERS)
def test_start_is_replayed_exactly(name, synthetic, drive):
    world = synthetic(2)
    starting_from(world, ("start:a", drawn(world.problem, 0)), ("start:b", drawn(world.problem, 1)))
    first = make_solver(name, world.problem, SETTINGS)
    begun = drive(first, world, asks=3)
    second = make_solver(name, world.problem, SETTINGS, first.state())
    assert [p for p, _ in drive(second, world, asks=3)] == [p for p, _ in begun]
    assert [p for p, _ in drive(first, world)] == [p for p, _ in drive(second, world)]


@pytest.mark.parametrize("name", SOLVERS)
def test_starts_stop_at_the_end_of_the_budget(name, synthetic, drive):
    world = synthetic(1)
    starting_from(world, *((f"start:{n}", drawn(world.problem, n)) for n in range(5)))
    settings = replace(SETTINGS, tokens=2 * 16 * 8)
    log = drive(make_solver(name, world.problem, settings), world)
    assert [p.origin for p, _ in log] == ["start:0", "start:1"]


@pytest.mark.parametrize("name", ["evopress", "hybrid"])
def test_evolution_begins_at_the_best_start(name, synthetic, drive, winner):
    world = synthetic(0, blocks=2, options=4)
    strong = replace(SETTINGS, tokens=8_000)
    found = winner(world, drive(make_solver("evopress", world.problem, strong), world), strong)
    starting_from(world, ("start:found", found))
    small = replace(SETTINGS, tokens=2_000)
    log = drive(make_solver(name, world.problem, small), world)
    best = winner(world, log, small)
    assert world.loss(best) <= 1.1 * world.loss(found)
    children = [p.config for p, _ in log if p.origin.startswith(("evopress", "hybrid"))]
    near = min(sum(a != b for a, b in zip(found, c, strict=True)) for c in children if c != found)
    assert near <= 3


@pytest.mark.parametrize("name", ["optuna:nsga2", "optuna:tpe"])
def test_sampler_is_not_told_of_a_start_outside_the_limits(name, synthetic, drive, monkeypatch):
    import optuna

    world, added = synthetic(1), []
    good, outside = drawn(world.problem, 0), drawn(world.problem, 1, feasible=False)
    starting_from(world, ("start:outside", outside), ("start:good", good))
    add = optuna.Study.add_trial

    def note(study, trial):
        added.append(tuple(trial.params.values()))
        add(study, trial)

    monkeypatch.setattr(optuna.Study, "add_trial", note)
    drive(make_solver(name, world.problem, SETTINGS), world)
    assert good in added and outside not in added
