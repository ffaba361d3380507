"""What every solver promises, and what each reaches on problems with known losses."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import optuna
import pytest

from apportion.errors import ApportionError, InvalidInput
from apportion.search.solver import Settings
from apportion.search.solvers import SOLVERS, make_solver
from apportion.search.solvers.exact import Exact

SETTINGS = Settings(
    seed=3, tokens=6_000, window_tokens=8, windows=16, offspring=8, stage_windows=(2, 16)
)


def spent(log):
    return sum(p.slice.windows for p, _ in log) * SETTINGS.window_tokens


@pytest.mark.parametrize("name", SOLVERS)
def test_solver_keeps_its_budget_and_repeats_nothing(name, synthetic, drive):
    world = synthetic(1)
    log = drive(make_solver(name, world.problem, SETTINGS), world)
    asked = [(p.config, p.slice) for p, _ in log]
    assert len(set(asked)) == len(asked)
    assert all(world.problem.canonical(config) == config for config, _ in asked)
    assert all(part.stop <= SETTINGS.windows for _, part in asked)
    assert 0 < spent(log) <= SETTINGS.tokens


@pytest.mark.parametrize("tokens", [0, 8, 300, 2000])
@pytest.mark.parametrize("name", SOLVERS)
def test_solver_ends_on_a_budget_too_small_for_it(name, tokens, synthetic, drive):
    world = synthetic(1)
    log = drive(make_solver(name, world.problem, replace(SETTINGS, tokens=tokens)), world)
    assert spent(log) <= tokens


@pytest.mark.parametrize("name", SOLVERS)
def test_solver_proposes_the_same_when_replayed(name, synthetic, drive):
    world = synthetic(2)
    first = make_solver(name, world.problem, SETTINGS)
    begun = drive(first, world, asks=4)
    second = make_solver(name, world.problem, SETTINGS, first.state())
    replayed = drive(second, world, asks=4)
    assert [p for p, _ in replayed] == [p for p, _ in begun]
    assert [p for p, _ in drive(first, world)] == [p for p, _ in drive(second, world)]


def test_replay_solves_no_program_again(synthetic, drive, monkeypatch):
    world = synthetic(2)
    first = make_solver("hybrid", world.problem, SETTINGS)
    log = drive(first, world)
    monkeypatch.setattr(Exact, "_solve", lambda *_: pytest.fail("solved again"))
    second = make_solver("hybrid", world.problem, SETTINGS, first.state())
    assert [p for p, _ in drive(second, world)] == [p for p, _ in log]


@pytest.mark.parametrize("name", ["optuna:nsga2", "optuna:tpe"])
def test_replay_draws_nothing_again(name, synthetic, drive, monkeypatch):
    world = synthetic(2)
    first = make_solver(name, world.problem, SETTINGS)
    log = drive(first, world)
    monkeypatch.setattr(optuna.Study, "ask", lambda *_: pytest.fail("drawn again"))
    state = json.loads(json.dumps(first.state()))
    second = make_solver(name, world.problem, SETTINGS, state)
    assert [p for p, _ in drive(second, world)] == [p for p, _ in log]


@pytest.mark.parametrize("name", SOLVERS)
def test_solver_goes_on_after_failures(name, synthetic, drive, winner):
    world = synthetic(1)
    world.fails = lambda config: config[2] == 4 or config[9] == 3
    log = drive(make_solver(name, world.problem, SETTINGS), world)
    failed = {p.config for p, r in log if r.failure}
    assert not world.fails(winner(world, log, SETTINGS))
    assert all([p.config for p, _ in log].count(config) == 1 for config in failed)


@pytest.mark.parametrize("name", ["ilp", "hybrid", "greedy"])
def test_solver_never_combines_an_option_that_failed_alone(name, synthetic, drive):
    world = synthetic(1)
    world.fails = lambda config: config[2] == 4
    log = drive(make_solver(name, world.problem, SETTINGS), world)
    later = [p for p, _ in log if not p.origin.startswith(("score", "uniform"))]
    assert later and not any(world.fails(p.config) for p in later)


@pytest.mark.parametrize("name", SOLVERS)
def test_solver_ends_where_no_configuration_is_feasible(name, synthetic, drive):
    world = synthetic(1)
    world.problem = replace(world.problem, limit={"bytes": 1.0, "latency": 1.0})
    assert spent(drive(make_solver(name, world.problem, SETTINGS), world)) <= SETTINGS.tokens


@pytest.mark.parametrize("name", SOLVERS)
def test_solver_works_without_limits(name, synthetic, drive):
    world = synthetic(1)
    world.problem = replace(world.problem, limit={})
    log = drive(make_solver(name, world.problem, SETTINGS), world)
    assert len({p.config for p, _ in log if p.slice == SETTINGS.full}) >= 4


def test_solver_reads_a_finished_loss_table_instead_of_scoring(synthetic, drive):
    world = synthetic(1)
    loss = np.where(np.isnan(world.problem.loss), 0.01, world.problem.loss)
    world.problem = replace(world.problem, loss=loss)
    log = drive(make_solver("hybrid", world.problem, SETTINGS), world)
    assert log and not any(p.origin == "score" for p, _ in log)


def test_evopress_finds_the_optimum_of_a_small_additive_problem(synthetic, drive, winner):
    hits = 0
    for seed in range(4):
        world = synthetic(seed, blocks=1, options=4, dimensions=4096)
        settings = replace(SETTINGS, tokens=12_000, seed=seed)
        world.windows[:] = 1.0
        log = drive(make_solver("evopress", world.problem, settings), world)
        assert all(world.problem.feasible(p.config) for p, _ in log)
        table = np.where(world.problem.present, (world.moves**2).sum(axis=2), np.inf)
        optimum = Exact(world.problem, {}).solve(table)
        hits += world.loss(winner(world, log, settings)) <= 1.02 * world.loss(optimum)
    assert hits >= 3


def test_hybrid_beats_uniform_and_ilp_and_evopress_with_twice_its_tokens(synthetic, drive, winner):
    tokens = {"uniform": 8_000, "ilp": 8_000, "evopress": 16_000, "hybrid": 8_000}
    mean = dict.fromkeys(tokens, 0.0)
    for seed in range(3):
        world = synthetic(seed, blocks=4, options=6, dimensions=32)
        for name in tokens:
            settings = replace(SETTINGS, tokens=tokens[name], seed=seed)
            log = drive(make_solver(name, world.problem, settings), world)
            mean[name] += np.log(world.loss(winner(world, log, settings))) / 3
    assert mean["hybrid"] < mean["uniform"] - 0.5
    assert mean["hybrid"] <= min(mean["ilp"], mean["evopress"])


@pytest.mark.parametrize("name", ["ilp", "hybrid"])
def test_solver_gives_a_front_of_eight_points(name, synthetic, drive):
    world = synthetic(0)
    log = drive(make_solver(name, world.problem, SETTINGS), world)
    climbed = {p.config for p, _ in log if p.slice == SETTINGS.full}
    totals = sorted(world.problem.total("bytes", config) for config in climbed)
    assert len(climbed) >= 8 and totals[0] < 0.9 * world.problem.limit["bytes"]
    assert totals[-1] > 1.1 * world.problem.limit["bytes"]


def test_sampler_proposals_carry_the_vector_they_repair(synthetic, drive):
    world = synthetic(1)
    log = drive(make_solver("optuna:tpe", world.problem, SETTINGS), world)
    suggested = [p for p, _ in log if p.origin == "optuna:tpe"]
    assert suggested and all(p.vector is not None for p in suggested)
    assert any(p.vector != p.config for p in suggested)


def test_make_solver_lists_the_known_names(synthetic):
    with pytest.raises(InvalidInput, match="hybrid, ilp"):
        make_solver("gradient", synthetic(0).problem, SETTINGS)


def test_tell_refuses_what_was_not_asked(synthetic):
    solver = make_solver("uniform", synthetic(0).problem, SETTINGS)
    assert solver.ask() == solver.ask()
    with pytest.raises(ApportionError, match="awaited"):
        solver.tell([])


def test_import_pulls_in_no_heavy_library():
    heavy = "{'torch', 'optuna', 'pulp', 'highspy', 'ray', 'sqlalchemy'}"
    code = f"import sys, apportion.search.solvers; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
