"""The driver: runs the stages of one study in order, each once, and keeps what they give.

It alone writes to the database. Killed at any moment, it is run again by `resume`: finished stages
are read, the search is replayed from its stored trials, and only what was in flight is redone.
"""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from apportion.files import write_whole
from apportion.hashing import content_hash
from apportion.search.problem import Config, Problem
from apportion.search.solver import Settings
from apportion.search.solvers.exact import infeasibility
from apportion.studies.cli.reports import spent
from apportion.studies.context import Context, Output, worker_spec
from apportion.studies.database.rows import NewTrial
from apportion.studies.evaluations import Runner
from apportion.studies.judging import Judging
from apportion.studies.pools import open_pool
from apportion.studies.pricing import Prices
from apportion.studies.spool import Spool
from apportion.studies.stages import compress, discover, profile
from apportion.studies.stages.search import Candidate, Progressed, Search, check_limits
from apportion.studies.starts import start_configurations
from apportion.workers.pool import InProcessPool, Pool
from apportion.workers.spec import build_beside_others, build_evaluator

MOST_ROUNDS = 3


def drive(context: Context) -> None:
    """Run a study from wherever it stands to its end.

    Raises:
        InvalidInput: something of the user's is wrong or has changed; nothing was repeated.
        Stopped: the user asked to stop; all that is finished is stored.
    """
    found = _discover(context)
    discover.check_unchanged(context, found)
    discover.check_starts(found)
    discover.check_norms(context, found)
    starts = found.get("start", ())
    profiled = context.stage("profile", lambda: profile.run(context, starts))
    prices = profile.prices(context, profiled)
    _refuse_impossible(context, prices)
    context.record_change()
    compressed = context.stage("compress", lambda: compress.run(context, prices.space))
    if context.report() is None:
        compress.restore(context, prices.space, compressed["index"])
        start = start_configurations(context, prices, starts, compressed)
        _rounds(context, prices, profiled, compressed["index"], start)
    context.say("done", "")


def _discover(context: Context) -> Output:
    with context.display.stage("discover") as bar:
        output = context.stage("discover", lambda: discover.run(context))
        bar.end(discover.summary(context.setting.space))
    return output


def _refuse_impossible(context: Context, prices: Prices) -> None:
    """Say that limits cannot be met before the bank is built."""
    limits = context.spec.parsed_limits
    stated = {limit.kind: prices.limit_value(limit) for limit in limits}
    check_limits(prices.problem(limits, {}), stated)


def _rounds(
    context: Context,
    prices: Prices,
    profiled: Output,
    index: dict[str, dict[str, str]],
    start: tuple[tuple[str, Config], ...],
) -> None:
    """Search and confirm; a broken limit starts again at search with a tighter one."""
    tightening: dict[str, float] = {}
    candidates: list[Candidate] = []
    with _pool(context, index) as pool:
        spool = Spool(context.home.spool(context.spec.study.name))
        runner = Runner(context.store, context.lease, pool, spool, context.stop.is_set)
        runner.drain()
        for round in range(context.first_round, context.first_round + MOST_ROUNDS):
            problem = replace(prices.problem(context.spec.parsed_limits, tightening), start=start)
            # Where nothing is left below the tightened limit, the last candidates are all there is.
            exhausted = bool(candidates) and infeasibility(problem) is not None
            if not exhausted:
                candidates = _search_round(context, prices, problem, runner, index, round)
            judging = Judging(
                context,
                prices,
                profiled,
                index,
                runner,
                candidates,
                index_file=_index_file(context, index),
                final=exhausted or round == context.first_round + MOST_ROUNDS - 1,
            )
            judged = context.stage("confirm", judging.run, round)
            if not judged["broken"]:
                context.store.record_stage(
                    context.lease, "report", context.first_round, judged, 0.0
                )
                return
            for kind, excess in judged["broken"].items():
                tightening[kind] = tightening.get(kind, 1.0) / excess
                context.display.warning(
                    f"limits.{kind}: the measured winner is {100 * (excess - 1):.1f} % above it; "
                    "searching again with a tighter limit"
                )


def _search_round(
    context: Context,
    prices: Prices,
    problem: Problem,
    runner: Runner,
    index: dict[str, dict[str, str]],
    round: int,
) -> list[Candidate]:
    """The candidates of a round: from the stage's output, or by running the solver."""
    search = _search(context, prices, problem, runner, index, round)
    trials = [t for t in context.store.trials(context.study_id, round) if t.part == "search"]
    state = context.store.solver_answers(context.study_id, round)
    found: list[Candidate] = []

    def run() -> Output:
        with context.display.stage("search") as bar:
            told, unit = "nothing to do", context.spec.data.unit
            since, replayed = time.monotonic(), 0
            for progress in search.run(trials, state, found):
                told = _told(progress, search.settings.tokens, unit)
                bar.update(progress.tokens, search.settings.tokens, told)
                context.progress |= {"tokens": progress.tokens, "best": progress.best}
                context.progress["cached"] = context.progress.get("cached", 0) + progress.reused
                if progress.is_new:
                    pace = (time.monotonic() - since) / (progress.tokens - replayed)
                    left = pace * (search.settings.tokens - progress.tokens)
                    context.progress["seconds_left"] = left
                    context.say("running", "search", pool=runner.pool)
                else:
                    since, replayed = time.monotonic(), progress.tokens
            bar.end(told)
        return {"candidates": [_candidate_json(c) for c in found]}

    output = context.stage("search", run, round)
    return [_candidate(value) for value in output["candidates"]]


def _told(progress: Progressed, budget: int, unit: str) -> str:
    best = "none within limits yet" if progress.best is None else f"best {progress.best:.4g}"
    return f"{spent(progress.tokens, budget, unit)} · {progress.evaluations} evaluations · {best}"


def _candidate_json(candidate: Candidate) -> dict[str, Any]:
    return {**candidate.__dict__, "config": list(candidate.config)}


def _candidate(value: Mapping[str, Any]) -> Candidate:
    return Candidate(**{**value, "config": tuple(value["config"])})


def _search(
    context: Context,
    prices: Prices,
    problem: Problem,
    runner: Runner,
    index: dict[str, dict[str, str]],
    round: int,
) -> Search:
    search = context.spec.search
    windows = min(search.windows, context.samples("search").windows)
    settings = Settings(
        seed=context.spec.study.seed,
        tokens=search.tokens,
        window_tokens=context.window_tokens,
        windows=windows,
        offspring=search.offspring,
        survivors=search.survivors,
        stage_windows=tuple(min(stage, windows) for stage in search.stages),
    )

    answered = set(context.store.solver_answers(context.study_id, round))
    next_number = context.store.trial_count(context.study_id)
    layout = prices.layout

    def record(trials: list[NewTrial], state: Mapping[str, Any]) -> Sequence[int]:
        nonlocal next_number
        new = {question: state[question] for question in state.keys() - answered}
        numbers = context.store.record_proposals(
            context.lease, round, next_number, layout, trials, new
        )
        next_number = numbers.stop
        answered.update(new)
        return numbers

    naming = context.naming(index)
    return Search(prices, problem, settings, search.solver, naming, runner, record)


@contextmanager
def _pool(context: Context, index: dict[str, dict[str, str]]) -> Iterator[Pool]:
    """The workers, ended in any case."""
    spec = worker_spec(context.spec, context.home, _index_file(context, index))

    def in_process() -> InProcessPool:
        evaluator = build_evaluator(spec)
        evaluator.check()
        return InProcessPool(evaluator.evaluate, on_overdue=context.tell_overdue)

    pool = open_pool(context, spec, build_beside_others, in_process)
    try:
        yield pool
    finally:
        pool.close()
        context.record_bill(pool)


def _index_file(context: Context, index: dict[str, dict[str, str]]) -> Path:
    """The bank's index as a file for workers; written again where the cache was emptied."""
    path = context.home.cache / f"bank-{content_hash(index)}.json"
    if not path.is_file():
        write_whole(path, json.dumps(index).encode())
    return path
