"""What the database costs a trial, in CPU, in bytes, and in the wait at a resume.

Formula. A trial is proposed (16 at a time, in one transaction), looked up, its result recorded (a
transaction each), and the batch's progress and bill stored: the calls that a driver makes, through
`Search` and `Runner`, with evaluations that cost nothing. CPU is that of the process, less what
the solver and the evaluator take by themselves in a run without a database, over the next 320
trials of a study that has 100, or 10,000. Size: growth of the file per trial, write-ahead log
merged. Cold start: a new process, everything imported, from opening the database to the first
proposal that is not stored, with 5,000 trials.

Assumptions. 200 sites of 8 options, 64 windows; one process on one file, or one server's database.
The solvers are those that go on until their budget is spent.

Ceiling: SQLite's own work for two transactions, about 0.2 ms of CPU; a configuration is 200 bytes.
Beside it, in the same run, Optuna's RDB storage with 200 categorical parameters.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import simulated
from _report import Claim, at_most, table, write
from postgresql_server import PostgreSQLServer

from apportion.hashing import content_hash
from apportion.studies.cli.display import QuietDisplay
from apportion.studies.database import Evaluation, Lease, NewTrial, Store
from apportion.studies.evaluations import Stopped
from apportion.studies.holding import leased
from apportion.workers.pool import InProcessPool

SITES, WINDOWS, BATCH = 200, 64, 16
HISTORIES, MEASURED = (100, 10_000), 320
COLD_TRIALS = 5_000
COLD_SOLVERS = ("evopress", "hybrid")
OPTUNA_TRIALS = 20
Row = dict[str, Any]


def batches(lease: Lease, store: Store, first: int, count: int) -> Iterator[list[NewTrial]]:
    """Proposals that nobody has made before, as a solver's come."""
    costs = simulated.prices(SITES)
    rng = np.random.default_rng(first)
    for _ in range(0, count, BATCH):
        configs = rng.integers(0, len(simulated.OPTIONS), (BATCH, SITES)).tolist()
        made = []
        for config in configs:
            configuration = costs.space.configuration(tuple(config))
            key = content_hash([configuration, 0, WINDOWS])
            made.append(
                NewTrial(
                    configuration=configuration, first_window=0, windows=WINDOWS, part="search",
                    origin="evopress:g17:s2", costs=costs.costs(tuple(config)), evaluation_key=key,
                )
            )  # fmt: skip
        yield made


def fill(store: Store, lease: Lease, first: int, count: int) -> float:
    """Do what a driver asks of the store for so many trials; CPU seconds of that alone."""
    layout = simulated.prices(SITES).layout
    rng = np.random.default_rng(1)
    spent, number = 0.0, first
    for proposals in batches(lease, store, first, count):
        losses = [rng.random(WINDOWS).astype(np.float32).astype(float) for _ in proposals]
        began = time.process_time()
        answers = {f"evopress:g{number}": [[], {"state": number}]}
        store.record_proposals(lease, 0, number, layout, proposals, answers)
        number += len(proposals)
        store.evaluations([t.evaluation_key for t in proposals], lease.study_id)
        for trial, found in zip(proposals, losses, strict=True):
            result = Evaluation(found, np.full(WINDOWS, 128.0), None, 0.05)
            store.record_evaluation(lease, trial.evaluation_key, result)
        store.set_state(lease, "running", "search", '{"tokens": 1}')
        store.record_bill(lease, {"done": (number, 0.05 * number)})
        spent += time.process_time() - began
    return spent


def per_trial(address: str, engine: str, size: Callable[[], int]) -> list[Row]:
    """CPU milliseconds and bytes of a trial, at each length of the history."""
    store, rows = Store.open(address), []
    study = store.create_study("size", {}, "hash")
    with leased(store, study.id, Event(), QuietDisplay()) as lease:
        for history in HISTORIES:
            fill(store, lease, store.trial_count(study.id), history - store.trial_count(study.id))
            before, number = size(), store.trial_count(study.id)
            began = time.perf_counter()
            spent = fill(store, lease, number, MEASURED)
            wall = time.perf_counter() - began
            rows.append(
                {
                    "storage": engine,
                    "history": number,
                    "cpu_ms": 1000 * spent / MEASURED,
                    "trials_per_second": MEASURED / wall,
                    "bytes_total": size() / store.trial_count(study.id),
                }
            )
            print(rows[-1], before, flush=True)
    store.close()
    return rows


def sqlite_size(path: Path) -> Callable[[], int]:
    """The size of the file with its log merged."""

    def size() -> int:
        import sqlite3

        with sqlite3.connect(path) as connection:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        return path.stat().st_size

    return size


def cold(folder: Path, solver: str) -> Row:
    """Wall seconds from opening a database with 5,000 trials to the first new proposal."""
    path = folder / f"{solver}.db"
    plan = plan_of(solver)
    store = Store.open(path)
    pool = InProcessPool(simulated.Simulated(SITES, 0.0, "").evaluate)
    stopped_at = stop_after(store, COLD_TRIALS)
    with suppress(Stopped):
        simulated.run(plan, store, pool, folder / "spool")
    trials = stopped_at()
    pool.close()
    store.close()
    done = subprocess.run(
        [sys.executable, "-P", __file__, "--cold", str(path), solver],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent)},
        check=True,
        capture_output=True,
        text=True,
    )
    row: Row = json.loads(done.stdout.splitlines()[-1])
    return {"solver": solver, "trials": trials} | row


def plan_of(solver: str) -> simulated.Plan:
    """Longer than the trials that are looked at."""
    return simulated.Plan("cold", solver, SITES, 4 * COLD_TRIALS, WINDOWS)


def stop_after(store: Store, trials: int) -> Callable[[], int]:
    """Stop the study that is to be run in this process once it has so many trials."""
    record = store.record_proposals

    def counted(lease: Lease, round: int, first: int, *rest: Any) -> range:
        numbers = record(lease, round, first, *rest)
        if numbers.stop >= trials:
            store.ask_to_stop(lease.study_id, "gently")
        return numbers

    store.record_proposals = counted  # type: ignore[method-assign]
    return lambda: store.trial_count(1)


class FirstProposal(Exception):
    """The one that was waited for."""


def measure_cold(path: str, solver: str) -> None:
    """In a process of its own: go on until something new is proposed, and print the seconds."""
    plan, quiet = plan_of(solver), QuietDisplay()
    pool = InProcessPool(simulated.Simulated(SITES, 0.0, "").evaluate)
    began, cpu = time.perf_counter(), time.process_time()
    store = Store.open(path)
    row = store.find_study(plan.name)
    assert row is not None

    def proposed(*_: Any) -> range:
        raise FirstProposal

    store.record_proposals = proposed  # type: ignore[method-assign]
    stop = Event()
    with leased(store, row.id, stop, quiet) as lease:
        with simulated.search(plan, store, lease, pool, Path(path).parent, stop) as steps:
            try:
                for _ in steps():
                    pass
            except FirstProposal:
                seconds = time.perf_counter() - began
                print(json.dumps({"seconds": seconds, "cpu": time.process_time() - cpu}))
    pool.close()


def optuna_rows(folder: Path) -> list[Row]:
    """Optuna's own storage, the same width: CPU of ask, 200 suggestions and tell."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    path = folder / "optuna.db"
    storage = optuna.storages.RDBStorage(f"sqlite:///{path}")
    sampler = optuna.samplers.RandomSampler(seed=0)
    study = optuna.create_study(storage=storage, sampler=sampler)
    began = time.process_time()
    for _ in range(OPTUNA_TRIALS):
        trial = study.ask()
        for site in range(SITES):
            trial.suggest_categorical(f"site{site}", list(range(len(simulated.OPTIONS))))
        study.tell(trial, 1.0)
    spent = time.process_time() - began
    return [
        {
            "storage": "optuna on sqlite",
            "history": 0,
            "cpu_ms": 1000 * spent / OPTUNA_TRIALS,
            "trials_per_second": None,
            "bytes_total": path.stat().st_size / OPTUNA_TRIALS,
        }
    ]


def claims(rows: Sequence[Row], starts: Sequence[Row]) -> list[Claim]:
    """The bounds that the database is held to."""
    made = []
    for engine in ("sqlite", "postgresql"):
        short, long = (row for row in rows if row["storage"] == engine)
        for row in (short, long):
            name = f"{engine}: CPU of a trial, {row['history']:,} trials stored"
            made.append(at_most(name, row["cpu_ms"], "ms", 2.0))
        name = f"{engine}: CPU at {long['history']:,} trials / at {short['history']:,}"
        made.append(at_most(name, long["cpu_ms"] / short["cpu_ms"], "x", 1.2))
    size = next(r for r in rows if r["storage"] == "sqlite" and r["history"] >= HISTORIES[1])
    bound = 1024 + 4 * WINDOWS
    made.append(at_most("sqlite: size of a trial", size["bytes_total"], "bytes", bound))
    for row in starts:
        name = f"{row['solver']}: cold start to the first proposal, {row['trials']:,} trials"
        made.append(at_most(name, row["seconds"], "s", 2.0))
    return made


def main() -> None:
    """All of it, then the claims."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--cold", nargs=2, metavar=("PATH", "SOLVER"))
    given = parser.parse_args()
    if given.cold:
        measure_cold(*given.cold)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = folder / "size.db"
        rows = per_trial(str(path), "sqlite", sqlite_size(path))
        server = PostgreSQLServer()
        try:
            server.start()
            whole = "SELECT pg_database_size('postgres')"
            rows += per_trial(server.url(), "postgresql", lambda: int(server.sql(whole)))
        finally:
            server.remove()
        rows += optuna_rows(folder)
        starts = [cold(folder, solver) for solver in COLD_SOLVERS]
    columns = list(rows[0])
    table(columns, [[_told(row[key]) for key in columns] for row in rows])
    table(list(starts[0]), [[_told(value) for value in row.values()] for row in starts])
    write("database", 1, [*rows, *starts], claims(rows, starts))


def _told(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
