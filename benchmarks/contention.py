"""Writes and reads one SQLite file from 16 processes at once, for ten minutes.

Formula. Eight processes are drivers: each makes one study after another and records in it batch
after batch what `Search` and `Runner` record: 16 proposals in one transaction, the lookup of what
is stored, the results, the state, the bill. Eight are people looking: each goes through the list of
studies, takes one of them at random and reads its status, its trials and their results, with a
pause between two looks. A trial counts when its result is recorded. A wait is the wall time of one
call of the store, from the caller's side; an error is anything that a call raises.

Assumptions. 200 sites of 8 options, 64 windows; a study has 160 trials; evaluations take no time,
so that the drivers do nothing but write. The proposals are made before the clock starts. Everything
shares this machine's cores with the Python of 16 processes.

Ceiling: one synchronization of the disk for each transaction, one writer at a time.
"""

import argparse
import multiprocessing
import random
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import simulated
from _report import Claim, at_least, at_most, table, write

from apportion.hashing import content_hash
from apportion.studies.database import Evaluation, Lease, NewTrial, Store

SITES, WINDOWS, BATCH, BATCHES = 200, 64, 16, 10
AT_ONCE = 2
WRITERS = READERS = 8
WRITE, READ = "write", "read"
LEASE_SECONDS = 30.0
PAUSE_SECONDS = 0.25
MORE_SECONDS = 120.0  # for starting and ending
Row = dict[str, Any]
# Started afresh: a connection must not cross a fork.
processes = multiprocessing.get_context("spawn")


@dataclass
class Calls:
    """What became of a process' calls of the store.

    Attributes:
        waits: method -> the seconds of each call.
        trials: that were recorded, or read.
        studies: that were made, or looked at.
    """

    waits: dict[str, list[float]] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    trials: int = 0
    studies: int = 0

    def __call__(self, work: Callable[..., Any], *arguments: Any) -> Any:
        began = time.perf_counter()
        try:
            return work(*arguments)
        except Exception as error:
            self.errors.append(f"{work.__name__}: {type(error).__name__}: {error}")
            raise
        finally:
            seconds = time.perf_counter() - began
            self.waits.setdefault(work.__name__, []).append(seconds)


def proposals(count: int) -> list[NewTrial]:
    """Trials of a solver, all different."""
    costs = simulated.prices(SITES)
    rng = np.random.default_rng(simulated.SEED)
    configs = [tuple(c) for c in rng.integers(0, len(simulated.OPTIONS), (count, SITES)).tolist()]
    return [
        NewTrial(
            configuration=costs.space.configuration(config), first_window=0, windows=WINDOWS,
            part="search", origin="evopress:g17:s2", costs=costs.costs(config), evaluation_key="",
        )
        for config in configs
    ]  # fmt: skip


def of_study(name: str, trials: list[NewTrial]) -> list[NewTrial]:
    """The same proposals with evaluations that no other study has."""
    return [
        replace(trial, evaluation_key=content_hash([name, number]))
        for number, trial in enumerate(trials)
    ]


def drive(store: Store, call: Calls, name: str, trials: list[NewTrial], end: float) -> None:
    """One study from its creation to its release."""
    layout, weights = simulated.prices(SITES).layout, np.full(WINDOWS, 128.0)
    losses = np.random.default_rng(0).random((BATCH, WINDOWS)).astype(np.float32).astype(float)
    study = call(store.create_study, name, {}, "hash")
    lease: Lease = call(store.acquire, study.id, LEASE_SECONDS)
    for first in range(0, len(trials), BATCH):
        if time.time() > end:
            break
        batch = trials[first : first + BATCH]
        keys = [trial.evaluation_key for trial in batch]
        answers = {f"evopress:g{first}": [[], {"state": first}]}
        call(store.record_proposals, lease, 0, first, layout, batch, answers)
        call(store.evaluations, keys, study.id)
        results = [Evaluation(found, weights, None, 0.05) for found in losses]
        done = list(zip(keys, results, strict=True))
        for place in range(0, BATCH, AT_ONCE):
            call(store.record_evaluations, lease, dict(done[place : place + AT_ONCE]))
        call.trials += len(batch)
        call(store.set_state, lease, "running", "search", f'{{"tokens": {first}}}')
        call(store.record_bill, lease, {"done": (first + BATCH, 0.05 * first)})
    call(store.set_state, lease, "done", "", "{}")
    call(store.release, lease)


def look(store: Store, call: Calls, drawn: random.Random) -> None:
    """What `list`, `status`, `trials` and the view of results read."""
    studies = call(store.studies)
    if not studies:
        return
    study = drawn.choice(studies)
    call(store.find_study, study.name)
    call(store.bill, study.id)
    call(store.stage_seconds, study.id)
    trials = call(store.trials, study.id)
    call(store.evaluations, [trial.evaluation_key for trial in trials], study.id)
    call.trials += len(trials)


def process(path: str, kind: str, number: int, seconds: float, ready: Any, answers: Any) -> None:
    """One of the 16, until the time is over or a call fails."""
    call, drawn = Calls(), random.Random(number)
    trials = proposals(BATCH * BATCHES) if kind == WRITE else []
    store = Store.open(path)
    ready.wait()
    end = time.time() + seconds
    while time.time() < end and not call.errors:
        with suppress(Exception):  # counted in call.errors
            if kind == WRITE:
                name = f"w{number}-{call.studies}"
                drive(store, call, name, of_study(name, trials), end)
            else:
                look(store, call, drawn)
                time.sleep(PAUSE_SECONDS)
        call.studies += 1
    store.close()
    answers.put((kind, call))


def together(path: Path, seconds: float) -> dict[str, list[Calls]]:
    """What became of the calls of all processes, by kind."""
    kinds = [WRITE] * WRITERS + [READ] * READERS
    ready, answers = processes.Barrier(len(kinds)), processes.Queue()
    started = [
        processes.Process(target=process, args=(str(path), kind, number, seconds, ready, answers))
        for number, kind in enumerate(kinds)
    ]
    for each in started:
        each.start()
    found: dict[str, list[Calls]] = {WRITE: [], READ: []}
    for _ in started:
        kind, calls = answers.get(timeout=seconds + MORE_SECONDS)
        found[kind].append(calls)
    for each in started:
        each.join()
    return found


def rows_of(found: dict[str, list[Calls]], seconds: float) -> list[Row]:
    """The waits of each method, by kind of process."""
    rows = []
    for kind, calls in found.items():
        for method in sorted({name for each in calls for name in each.waits}):
            waits = np.concatenate([each.waits.get(method, []) for each in calls])
            rows.append(
                {
                    "process": kind,
                    "call": method,
                    "calls_per_second": len(waits) / seconds,
                    "median_ms": 1000 * float(np.median(waits)),
                    "p99_ms": 1000 * float(np.quantile(waits, 0.99)),
                    "longest_ms": 1000 * float(waits.max()),
                }
            )
    return rows


def summary(found: dict[str, list[Calls]], path: Path, minutes: float) -> Row:
    """The run as a whole."""
    store = Store.open(path)
    problems = store.check().problems
    stored = sum(store.trial_count(study.id) for study in store.studies())
    store.close()
    recorded = sum(calls.trials for calls in found[WRITE])
    everything = [calls for of_kind in found.values() for calls in of_kind]
    return {
        "minutes": minutes,
        "processes": len(everything),
        "studies": sum(calls.studies for calls in found[WRITE]),
        "trials": recorded,
        "trials_stored": stored,
        "trials_per_second": recorded / (60 * minutes),
        "least_of_a_writer": min(calls.trials for calls in found[WRITE]) / (60 * minutes),
        "trials_read_per_second": sum(calls.trials for calls in found[READ]) / (60 * minutes),
        "longest_wait_s": max(max(w) for calls in everything for w in calls.waits.values()),
        "errors": [error for calls in everything for error in calls.errors],
        "damage": problems,
        "bytes": path.stat().st_size,
    }


def claims(run: Row) -> list[Claim]:
    """What 16 processes may expect of one file."""
    what = f"{run['minutes']:g} minutes, {run['processes']} processes, one SQLite file"
    return [
        at_most(f"{what}: errors that reach a caller", len(run["errors"]), "errors", 0),
        at_least(f"{what}: trials recorded", run["trials_per_second"], "1/s", 100),
        at_most(f"{what}: longest wait of one call", run["longest_wait_s"], "s", 10),
        at_most(f"{what}: trials lost, and damage found",
                abs(run["trials_stored"] - run["trials"]) + len(run["damage"]), "trials", 0),
    ]  # fmt: skip


def main() -> None:
    """The run, then the claims."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "studies.db"
        Store.open(path).close()
        found = together(path, 60 * given.minutes)
        run = summary(found, path, given.minutes)
    rows = rows_of(found, 60 * given.minutes)
    table(list(rows[0]), [[_told(value) for value in row.values()] for row in rows])
    print(" ".join(f"{key}={_told(value)}" for key, value in run.items()))
    write("contention", 1, [run, *rows], claims(run))


def _told(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
