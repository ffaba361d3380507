"""Strikes at a study's workers every 5 s and at its driver every 30 s, and counts what that did.

Formula. A simulated study, evaluations of 50 ms by four Ray workers. Every 5 s one worker, drawn at
random among those that evaluate, where several do, gets SIGKILL or SIGSTOP (and is never continued:
its time limit of 3 s must find it). One that evaluates alone does again what was lost before; an
evaluation that two workers are lost with is a failure, as it must be.
Every 30 s the driver gets SIGKILL, and another is started at once; or SIGSTOP beyond its lease of
4 s, another takes the study over, and then the first is continued: it must end by itself and write
nothing. Both clocks start with the first evaluation of a driver's workers. A cell is a solver on
an engine. Accounted are distinct evaluations with a stored result. Identical means: the same
trials in the same order, with the same losses to the last bit, as a study in one process that
nothing disturbed. Executions are counted by the evaluator itself, in a log. Executed again is at
most what was in flight: the evaluations that a struck worker was handed at once, as short ones are,
which is 0.2 s of them; of a struck driver as many of each worker, and as many more: what ended
while earlier results were being written, or what a continued driver hands out before it hears that
it has lost the study.

Assumptions. "uniform" ends after a few evaluations. "ilp" and "greedy" measure a table, of as many
sites as make 3,000 evaluations, and little else; "evopress" ends with its generation. "optuna:tpe"
is asked for a fifth: it reads its whole history for every proposal.

Ceiling: no time of the evaluator is lost but what was in flight. Besides, each new driver starts
Ray and its workers, 5 to 15 s of two cores. Resumable by cell.
"""

import argparse
import json
import math
import os
import random
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import simulated
from _report import RESULTS, ROOT, Claim, at_most, code, table, write

from apportion.hashing import content_hash
from apportion.studies.database import Store
from apportion.workers.patience import TOGETHER_SECONDS

NAME, WINDOWS = "chaos", 16
ENGINES = ("sqlite", "postgresql")
PLANS: dict[str, Callable[[int], tuple[int, int]]] = {
    "evopress": lambda wanted: (40, round(0.357 * wanted)),
    "hybrid": lambda wanted: (40, round(0.26 * wanted)),
    "ilp": lambda wanted: (round((wanted - 32) / 7), 2 * wanted),
    "greedy": lambda wanted: (round((wanted - 16) / 7), 2 * wanted),
    "optuna:nsga2": lambda wanted: (40, wanted),
    "optuna:tpe": lambda wanted: (40, wanted // 5),
    "uniform": lambda wanted: (40, wanted),
}
"""Solver -> the sites and the budget, in full evaluations, that make about so many evaluations."""
SECONDS, PATIENCE, LEASE_SECONDS = 0.05, 3.0, 4.0
MARK, MOST_FAILURES = "CHAOS_CELL", 3
POLL_SECONDS, END_SECONDS, WAIT_SECONDS = 0.1, 15.0, 60.0
SHOWN = (
    "solver", "engine", "accounted", "failed", "executions", "worker_kills", "worker_stops",
    "driver_kills", "driver_stops", "left_behind", "seconds",
)  # fmt: skip
Row = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """What is struck at, and how often."""

    solver: str
    engine: str
    evaluations: int
    workers: int = 4
    worker_every: float = 5.0
    driver_every: float = 30.0

    @property
    def plan(self) -> simulated.Plan:
        """The study."""
        return simulated.Plan(NAME, self.solver, *PLANS[self.solver](self.evaluations), WINDOWS)


class Monkey:
    """Keeps a study running and strikes at its processes until it is done.

    Attributes:
        strikes: (whom, signal) -> how often.
        awake: drivers that were continued and did not end by themselves.
        failures: how often a driver ended by itself before the study was done.
    """

    def __init__(self, cell: Cell, store: Store, start: Callable[[], "subprocess.Popen[bytes]"]):
        """`start` starts a driver."""
        self._cell, self._store, self._start = cell, store, start
        self._drawn = random.Random(simulated.SEED)
        self.strikes = {(w, s): 0 for w in ("worker", "driver") for s in ("KILL", "STOP")}
        self.awake = self.failures = 0
        self._driver = start()

    def play(self) -> None:
        """Until a driver has come to the end of the study."""
        cell, worker_at, driver_at = self._cell, math.inf, math.inf
        while self._goes_on():
            now = time.monotonic()
            is_due = driver_at == math.inf or now >= worker_at
            busy = list(evaluating(self._driver.pid)) if is_due else []
            if busy and driver_at == math.inf:
                worker_at, driver_at = now + cell.worker_every, now + cell.driver_every
            if len(busy) > 1 and now >= worker_at:
                with suppress(psutil.NoSuchProcess):
                    self._drawn.choice(busy).send_signal(self._draw("worker"))
                worker_at = now + cell.worker_every
            if now >= driver_at:
                self._strike_driver()
                worker_at = driver_at = math.inf
            time.sleep(POLL_SECONDS)

    def _goes_on(self) -> bool:
        if self._driver.poll():
            self.failures += 1
            if self.failures < MOST_FAILURES:
                self._driver = self._start()
        return self._driver.poll() is None

    def _draw(self, whom: str) -> signal.Signals:
        kind = self._drawn.choice(("KILL", "STOP"))
        self.strikes[whom, kind] += 1
        return signal.Signals[f"SIG{kind}"]

    def _strike_driver(self) -> None:
        old, number = self._driver, self._draw("driver")
        old.send_signal(number)
        if number == signal.SIGKILL:
            old.wait()
            self._driver = self._start()
            return
        self._until(lambda: not self._held()[0])
        _, epoch = self._held()
        self._driver = self._start()
        self._until(lambda: self._held()[1] > epoch or self._driver.poll() is not None)
        old.send_signal(signal.SIGCONT)
        try:
            old.wait(WAIT_SECONDS)
        except subprocess.TimeoutExpired:
            self.awake += 1
            old.kill()
            old.wait()

    def _held(self) -> tuple[bool, int]:
        study = self._store.find_study(NAME)
        return (False, 0) if study is None else (study.is_owned, study.epoch)

    def _until(self, holds: Callable[[], bool]) -> None:
        deadline = time.monotonic() + WAIT_SECONDS
        while not holds() and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)


def evaluating(driver: int) -> Iterator[psutil.Process]:
    """The workers below a driver that are busy, those apart that are stopped already."""
    with suppress(psutil.NoSuchProcess):
        for process in psutil.Process(driver).children(recursive=True):
            with suppress(psutil.Error, IndexError):
                is_busy = process.cmdline()[0] == "ray::EvaluatorActor.run"
                if is_busy and process.status() != psutil.STATUS_STOPPED:
                    yield process


def left_behind(mark: str) -> list[str]:
    """The command lines of processes of a cell, some time after its end."""
    deadline = time.monotonic() + END_SECONDS
    while (left := list(_marked(mark))) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    return left


def _marked(mark: str) -> Iterator[str]:
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.environ().get(MARK) == mark:
                yield " ".join(process.cmdline())


def expected(plan: simulated.Plan) -> Row:
    """The undisturbed run: its path and how much it evaluates; kept beside the code's hash."""
    sources = code("search", "studies", "benchmarks/simulated.py")
    name = content_hash([asdict(plan), sources])
    kept = ROOT / "build" / "chaos" / f"{name}.json"
    if not kept.exists():
        path = simulated.undisturbed(plan)
        distinct = {content_hash(trial[1:4]) for trial in path}
        found = {"path": content_hash(path), "trials": len(path), "evaluations": len(distinct)}
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(found))
    return dict(json.loads(kept.read_text()))


def run_cell(cell: Cell) -> Row:
    """One study under the monkey, and what came of it."""
    want, plan = expected(cell.plan), cell.plan
    with (
        tempfile.TemporaryDirectory() as name,
        simulated.database(cell.engine, Path(name)) as address,
    ):
        log, said = Path(name) / "executions", Path(name) / "said"
        search = {key: value for key, value in asdict(plan).items() if key != "window_tokens"}
        command = simulated.command(
            **search, address=address, workers=cell.workers, seconds=SECONDS, patience=PATIENCE,
            lease=LEASE_SECONDS, log=str(log), spool=str(Path(name) / "spool"),
        )  # fmt: skip
        paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), MARK: name}
        store, begun = Store.open(address), time.monotonic()
        with said.open("ab") as output:
            streams: Row = {"env": environment, "stdout": output, "stderr": output}
            monkey = Monkey(cell, store, lambda: subprocess.Popen(command, **streams))
            monkey.play()
        seconds = time.monotonic() - begun
        left = left_behind(name)
        path = simulated.path_of(store, NAME)
        store.close()
        if monkey.failures or monkey.awake or left:
            print(said.read_text()[-4000:], *left, sep="\n", flush=True)
        executions = len(log.read_text().split())
    return row_of(cell, monkey, want, path) | {
        "executions": executions,
        "left_behind": len(left),
        "seconds": round(seconds, 1),
    }


def row_of(cell: Cell, monkey: Monkey, want: Row, path: list[Any]) -> Row:
    """What was struck, and what is stored."""
    return {
        **asdict(cell),
        "sites": cell.plan.sites,
        "trials": len(path),
        "accounted": len({content_hash(trial[1:4]) for trial in path if trial[-1] is not None}),
        "undisturbed": want["evaluations"],
        "failed": sum(trial[-1] is None for trial in path),
        "identical": content_hash(path) == want["path"],
        **{f"{who}_{how.lower()}s": count for (who, how), count in monkey.strikes.items()},
        "failed_drivers": monkey.failures,
        "never_ended": monkey.awake,
    }


def most_executions(row: Row) -> int:
    """Each evaluation once, and again what was in flight when something was struck."""
    together = int(TOGETHER_SECONDS / SECONDS)
    of_workers = row["worker_kills"] + row["worker_stops"]
    of_drivers = row["driver_kills"] + row["driver_stops"]
    return int(row["undisturbed"] + together * (of_workers + 2 * row["workers"] * of_drivers))


def claims(rows: list[Row]) -> list[Claim]:
    """What strikes may cost: nothing but their time, and what was in flight."""
    made = []
    for row in rows:
        name = f"{row['solver']} on {row['engine']}"
        accounted, bad = row["accounted"], row["failed_drivers"] + row["never_ended"]
        made += [
            Claim(f"{name}: accounted", accounted, "evaluations", f"= {row['undisturbed']}",
                  accounted == row["undisturbed"]),
            at_most(f"{name}: executed", row["executions"], "evaluations", most_executions(row)),
            Claim(f"{name}: same path as undisturbed", row["identical"], "", "True",
                  row["identical"]),
            at_most(f"{name}: processes left behind", row["left_behind"], "processes", 0),
            at_most(f"{name}: drivers that failed, or did not end", bad, "drivers", 0),
        ]  # fmt: skip
    return made


def main() -> None:
    """The cells that are chosen and not there yet, then the claims."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--solvers", default=",".join(PLANS))
    parser.add_argument("--engines", default=",".join(ENGINES))
    parser.add_argument("--evaluations", type=int, default=3000)
    parser.add_argument("--again", action="store_true", help="run cells that are there, too")
    given = parser.parse_args()
    rows = _stored()
    for solver in given.solvers.split(","):
        for engine in given.engines.split(","):
            cell = Cell(solver, engine, given.evaluations)
            same = [row for row in rows if asdict(cell).items() <= row.items()]
            if same and not given.again:
                continue
            rows = [row for row in rows if row not in same] + [run_cell(cell)]
            write(NAME, 1, rows, claims(rows))
    table(SHOWN, [[str(row[key]) for key in SHOWN] for row in rows])


def _stored() -> list[Row]:
    with suppress(FileNotFoundError):
        return list(json.loads((RESULTS / f"{NAME}.json").read_text())["rows"])
    return []


if __name__ == "__main__":
    main()
