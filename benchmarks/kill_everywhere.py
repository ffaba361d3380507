"""Kills a study with SIGKILL at each commit boundary and at random moments, and resumes it.

Formula. Let the undisturbed run write its database in C commits. Its driver is killed once just
before and once just after each of them, 2 C cells, and at 10 moments drawn evenly over its length.
Each cell starts a study in a home of its own, kills it, and resumes it (submits it again where the
kill came before the study was stored). Identical means: the same trials in the same order (number,
configuration, slice, window losses to the last bit, origin) and the same winner as undisturbed.

Assumptions. One thread, a recorded device: every run reads the same stored timings. The tiny
study is evaluated in process; with --shipped it is one of the shipped model, with two Ray workers
(which end with their driver), killed at 30 moments. A kill ends the process, not the machine: what
a power cut does is the promise of SQLite's settings. Again means: the resumed run executed an
evaluation that was stored before.

Ceiling: all cells identical. Resumable: a finished cell is not run again while the folder stands.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import shipped_study
import tiny_study
from sqlalchemy import Connection, Engine, event
from sqlalchemy.engine.default import DefaultDialect

from apportion.cost_models.fingerprint import fingerprint
from apportion.hashing import content_hash
from apportion.studies import driver, preparation  # noqa: F401 (before the first fork)
from apportion.studies.database.sqlite import BEGIN
from apportion.studies.database.store import Store
from apportion.studies.study import Study, list_studies

MOMENTS, SHIPPED_MOMENTS = 10, 30
SOONER = 0.7
SEED = 0
RESULTS = Path(__file__).parent / "results"
# Cells are forks of this process, which has imported everything and runs no thread.
processes = multiprocessing.get_context("fork")


@dataclass(frozen=True)
class Case:
    """A study file and how it is run."""

    study: Path
    workers: int


def finish(case: Case, home: Path) -> None:
    """Submit the study, or resume it where it is stored."""
    if stored := list_studies(home):
        Study.open(stored[0]["name"], home).resume(case.workers)
    else:
        Study.submit(case.study, home=home, workers=case.workers)


def stored_and_executed(home: Path) -> tuple[int, int]:
    """Evaluations that the database holds, and executions on its bill."""
    if not list_studies(home):
        return 0, 0
    store = Store.open(home / "studies.db")
    try:
        (study,) = store.studies()
        executed = sum(count for count, _ in store.bill(study.id).values())
        return store.check().evaluations, executed
    finally:
        store.close()


def path_of(home: Path) -> dict[str, Any]:
    """What must be the same after a kill: the ordered trials with their losses, and the winner."""
    store = Store.open(home / "studies.db")
    try:
        (study,) = store.studies()
        trials = store.trials(study.id)
        done = store.evaluations([trial.evaluation_key for trial in trials])
        report = store.stage_output(study.id, "report")
    finally:
        store.close()
    rows = [
        [t.number, dict(t.configuration), t.first_window, t.windows, t.origin,
         [value.hex() for value in map(float, done[t.evaluation_key].losses)]]
        for t in trials
    ]  # fmt: skip
    return {"trials": rows, "report": report}


def at_commits(before: Callable[[int], None], after: Callable[[int], None]) -> None:
    """Tell of the writing commits of this process, by number, before and after each."""
    count = 0
    this_thread = threading.local()  # the lease is kept by another
    commit = DefaultDialect.do_commit

    @event.listens_for(Engine, "commit")
    def notice(connection: Connection) -> None:
        this_thread.writing = connection.get_execution_options().get(BEGIN) == "BEGIN IMMEDIATE"

    def counted(dialect: DefaultDialect, connection: Any) -> None:
        nonlocal count
        ours, this_thread.writing = getattr(this_thread, "writing", False), False
        count += ours
        if ours:
            before(count)
        commit(dialect, connection)
        if ours:
            after(count)

    DefaultDialect.do_commit = counted  # type: ignore[method-assign]


def nothing(number: int) -> None:
    """At this commit, go on."""


def killed_at(number: int) -> Callable[[int], None]:
    """At that commit, SIGKILL."""

    def strike(reached: int) -> None:
        if reached == number:
            os.kill(os.getpid(), signal.SIGKILL)

    return strike


def counting(case: Case, home: Path, answer: Any) -> None:
    """Run undisturbed; answer with the number of commits."""
    numbers: list[int] = []
    at_commits(nothing, numbers.append)
    finish(case, home)
    answer.send(len(numbers))


def disturbed(case: Case, home: Path, place: int, side: str) -> None:
    """Run until commit `place`."""
    strike = killed_at(place)
    at_commits(*((strike, nothing) if side == "before" else (nothing, strike)))
    finish(case, home)


def in_child(work: Callable[..., None], *arguments: Any, seconds: float | None = None) -> int:
    """Exit status of a forked process; after `seconds` it gets SIGKILL."""
    child = processes.Process(target=work, args=arguments)
    child.start()
    child.join(seconds)
    if child.is_alive():
        child.kill()
        child.join()
    return child.exitcode or 0


def asked(work: Callable[..., None], *arguments: Any) -> Any:
    """What a forked process answers; None where it failed."""
    mine, its = processes.Pipe(duplex=False)
    status = in_child(work, *arguments, its)
    return mine.recv() if status == 0 else None


def cell(case: Case, home: Path, kind: str, place: float, undisturbed: Any) -> dict[str, Any]:
    """Kill once, resume, compare."""
    shutil.rmtree(home, ignore_errors=True)
    if kind == "moment":
        ended = in_child(finish, case, home, seconds=place)
        if ended == 0:  # it was faster than the undisturbed run
            return cell(case, home, kind, round(place * SOONER, 3), undisturbed)
    else:
        ended = in_child(disturbed, case, home, int(place), kind)
    stored, executed = stored_and_executed(home)
    began = time.perf_counter()
    status = in_child(finish, case, home)
    seconds = time.perf_counter() - began
    stored_then, executed_then = stored_and_executed(home)
    return {
        "kill": kind,
        "place": place,
        "killed": ended == -signal.SIGKILL,
        "evaluations_run": executed_then - executed,
        "run_again": executed_then - executed - (stored_then - stored),
        "seconds": round(seconds, 2),
        "identical": status == 0 and path_of(home) == undisturbed,
    }


def cells(commits: int, seconds: float, every: int, moments: int) -> Iterator[tuple[str, float]]:
    """Where to kill."""
    for number in range(1, commits + 1, every):
        yield "before", number
        yield "after", number
    drawn = random.Random(SEED)
    for _ in range(moments):
        yield "moment", round(drawn.uniform(0, seconds), 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("build/kill_everywhere"))
    parser.add_argument("--results", type=Path)
    parser.add_argument("--shipped", action="store_true", help="the shipped model, two workers")
    parser.add_argument("--every", type=int, default=1, help="only each so many-th commit")
    parser.add_argument("--moments", type=int)
    given = parser.parse_args()
    name = "kill_shipped" if given.shipped else "kill_everywhere"
    results = given.results or RESULTS / f"{name}.json"
    moments = (
        (SHIPPED_MOMENTS if given.shipped else MOMENTS)
        if given.moments is None
        else (given.moments)
    )
    folder = given.folder.absolute() / name
    case = (
        Case(shipped_study.write(folder), 2) if given.shipped else Case(tiny_study.write(folder), 1)
    )
    home = folder / "home"
    shutil.rmtree(home, ignore_errors=True)
    began = time.perf_counter()
    commits = asked(counting, case, home)
    seconds = time.perf_counter() - began
    undisturbed = path_of(home)
    same = {"path": content_hash(undisturbed), "every": given.every}
    # How many results a commit holds depends on when they end, so a count from before is kept.
    measured, rows = _finished(results, same) or ({"commits": commits, "seconds": seconds}, [])
    commits, seconds = measured["commits"], measured["seconds"]
    same |= measured
    print(f"{commits} commits, {len(undisturbed['trials'])} trials, {seconds:.1f} s undisturbed")
    print(
        f"{'kill':>8} {'place':>8} {'killed':>7} {'run after':>10} {'seconds':>8} {'identical':>10}"
    )
    known = len(rows)
    wanted = list(cells(commits, seconds, given.every, moments))
    for kind, place in wanted[known:]:
        rows.append(cell(case, home, kind, place, undisturbed))
        print("{kill:>8} {place:>8} {killed!s:>7} {evaluations_run!s:>10} {seconds:>8} "
              "{identical!s:>10}".format(**rows[-1]), flush=True)  # fmt: skip
        _write(results, same, rows)
    _write(results, same, rows)
    raise SystemExit(not all(claim["holds"] for claim in _claims(rows)))


def _finished(
    results: Path, same: dict[str, Any]
) -> tuple[dict[str, Any], list[dict[str, Any]]] | None:
    """Commits and seconds, and the cells, of an earlier, interrupted run of the same study."""
    with contextlib.suppress(FileNotFoundError):
        stored = json.loads(results.read_text())
        study = stored["study"]
        if same.items() <= study.items() and "seconds" in study:
            return {key: study[key] for key in ("commits", "seconds")}, list(stored["rows"])
    return None


def _claims(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    claims = []
    for name, kinds in (("commit boundaries", ("before", "after")), ("moments", ("moment",))):
        of = [row for row in rows if row["kill"] in kinds]
        good = sum(row["identical"] for row in of)
        claims.append(
            {
                "name": f"{name} at which a killed study ends identically",
                "value": good,
                "unit": "cells",
                "bound": len(of),
                "holds": good == len(of),
            }
        )
    again = sum(row["run_again"] for row in rows)
    claims.append(
        {
            "name": "stored evaluations that a resumed study executed again",
            "value": again,
            "unit": "evaluations",
            "bound": 0,
            "holds": again == 0,
        }
    )
    return claims


def _write(results: Path, same: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    names = ("torch", "numpy", "sqlalchemy", "pulp", "highspy")
    value = {
        "machine": fingerprint(1),
        "versions": {name: version(name) for name in names} | {"sqlite": sqlite3.sqlite_version},
        "study": same,
        "rows": rows,
        "claims": _claims(rows),
    }
    results.parent.mkdir(parents=True, exist_ok=True)
    partial = results.with_suffix(".part")
    partial.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(partial, results)


if __name__ == "__main__":
    main()
