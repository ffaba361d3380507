"""A study without a model: real prices, search, runner and store; only losses are made up.

What the database and the workers are asked is what a real study asks them. An evaluation's loss is
a function of the configuration and the slice alone, so that every run must come to the same path.
"""

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
from postgresql_server import PostgreSQLServer

from apportion.hashing import content_hash
from apportion.kernels.formats import LayerShape
from apportion.search.solver import Settings
from apportion.spaces.grammar import parse_option
from apportion.spaces.sites import Member, Site
from apportion.spaces.space import Space
from apportion.studies import holding
from apportion.studies.cli.display import ConsoleDisplay
from apportion.studies.database import Lease, Store
from apportion.studies.evaluations import Runner
from apportion.studies.holding import leased, waiting
from apportion.studies.limits import parse_limit
from apportion.studies.pricing import Prices
from apportion.studies.spool import Spool
from apportion.studies.stages.search import Candidate, Progressed, Search
from apportion.workers.evaluator import Evaluate, Evaluation
from apportion.workers.patience import Patience
from apportion.workers.pool import InProcessPool, Pool
from apportion.workers.ray_pool import RayPool

OPTIONS = ("dense", "bf16", "w8", "w8a8", "w4g64", "w4", "w3g64", "w2g64")
BITS = (32.0, 16.0, 8.1, 8.1, 4.5, 4.1, 3.5, 2.5)
WEIGHTS = 64 * 64
LIMITS = {"weight_bytes": "1x w4g64"}
SEED = 0


def prices(sites: int) -> Prices:
    """Costs of `sites` layers with 8 options each."""
    rng = np.random.default_rng(SEED)
    each = tuple(
        Site(f"model.layers.{place}.mlp.up_proj", "linear",
             (Member(f"model.layers.{place}.mlp.up_proj", LayerShape(64, 64)),))
        for place in range(sites)
    )  # fmt: skip
    space = Space(each, tuple(tuple(map(parse_option, OPTIONS)) for _ in each))
    share = rng.uniform(0.5, 2.0, (sites, 1))
    size = np.round(share * np.asarray(BITS) * WEIGHTS / 8)
    flops = np.round(share * WEIGHTS * np.ones(len(OPTIONS)))
    uniform = {text: (place,) * sites for place, text in enumerate(OPTIONS) if place}
    rows = {"weight_bytes": size, "bits": flops}
    return Prices(space, rows, {"weight_bytes": 1e4, "bits": 0.0}, {}, uniform)


class Simulated:
    """Losses out of a table, with some interaction between neighbours."""

    def __init__(self, sites: int, seconds: float, log: str) -> None:
        rng = np.random.default_rng(SEED + 1)
        damage = np.array([0.0, 1e-5, 1e-4, 2e-4, 3e-3, 5e-3, 1.5e-2, 6e-2])
        self._loss = damage * rng.lognormal(0.0, 0.8, (sites, 1))
        self._rate = rng.uniform(0.5, 2.0, 4096)
        self._index = {text: place for place, text in enumerate(OPTIONS)}
        self._seconds, self._log = seconds, log

    def evaluate(self, work: Evaluate) -> Evaluation:
        """Takes its seconds, and says on a line of the log that it was executed."""
        started = time.perf_counter()
        if self._log:
            line = f"{content_hash([work.configuration, work.first_window, work.windows])}\n"
            file = os.open(self._log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            os.write(file, line.encode())
            os.close(file)
        time.sleep(self._seconds)
        chosen = [self._index[text] for text in work.configuration.values()]
        each = self._loss[np.arange(len(chosen)), chosen]
        loss = each.sum() + 20 * float((each[1:] * each[:-1]).sum())
        windows = np.arange(work.first_window, work.first_window + work.windows)
        losses = 128 * loss * self._rate[windows % len(self._rate)]
        return Evaluation(losses, np.full(work.windows, 128.0), None, time.perf_counter() - started)


@dataclass(frozen=True)
class Plan:
    """A simulated study."""

    name: str
    solver: str
    sites: int
    evaluations: int
    windows: int = 64
    window_tokens: int = 128

    @property
    def settings(self) -> Settings:
        """All evaluations are of the full slice where the solver has no stages of its own."""
        return Settings(
            seed=SEED,
            tokens=self.evaluations * self.windows * self.window_tokens,
            window_tokens=self.window_tokens,
            windows=self.windows,
            offspring=16,
            survivors=(4, 1),
            stage_windows=(4, self.windows),
        )


class SimulatedNaming:
    """Names of the evaluations of one study."""

    def __init__(self, name: str) -> None:
        self._name = name

    def key(self, configuration: dict[str, str], part: str, first: int, windows: int) -> str:
        return content_hash([self._name, configuration, part, first, windows])


@contextmanager
def search(
    plan: Plan, store: Store, lease: Lease, pool: Pool, spool: Path, stop: Event
) -> Iterator[Callable[[], Iterator[Progressed]]]:
    """Yields what runs the plan's search from where it stands."""
    costs = prices(plan.sites)
    limits = [parse_limit(kind, text) for kind, text in LIMITS.items()]
    runner = Runner(store, lease, pool, Spool(spool), stop.is_set)
    answers = store.solver_answers(lease.study_id, 0)
    answered = set(answers)
    number = store.trial_count(lease.study_id)

    def record(trials: Any, state: Any) -> range:
        nonlocal number
        new = {question: state[question] for question in state.keys() - answered}
        numbers = store.record_proposals(lease, 0, number, costs.layout, trials, new)
        number = numbers.stop
        answered.update(new)
        return numbers

    naming: Any = SimulatedNaming(plan.name)
    problem = costs.problem(limits, {})
    whole = Search(costs, problem, plan.settings, plan.solver, naming, runner, record)
    found: list[Candidate] = []
    runner.drain()
    yield lambda: whole.run(store.trials(lease.study_id, 0), answers, found)


def run(plan: Plan, store: Store, pool: Pool, spool: Path) -> None:
    """Create or go on with the study, to its end."""
    row = store.find_study(plan.name) or store.create_study(plan.name, {}, plan.name)
    stop, display = Event(), ConsoleDisplay(sys.stdout)
    store.database.goes_on = waiting(stop, display)
    with leased(store, row.id, stop, display) as lease:
        with search(plan, store, lease, pool, spool, stop) as steps:
            for progress in steps():
                if progress.is_new:
                    store.set_state(lease, "running", "search", f'{{"tokens": {progress.tokens}}}')
                    store.record_bill(lease, pool.bill.entries())
        store.set_state(lease, "done", "", "{}")


@contextmanager
def database(engine: str, folder: Path) -> Iterator[str]:
    """The address of a database of one's own."""
    if engine == "sqlite":
        yield str(folder / "studies.db")
        return
    server = PostgreSQLServer()
    try:
        server.start()
        yield server.url()
    finally:
        server.remove()


def path_of(store: Store, name: str) -> list[Any]:
    """The ordered trials of a study with their losses; None instead of a failure's."""
    study = store.find_study(name)
    assert study is not None
    trials = store.trials(study.id)
    done = store.evaluations({trial.evaluation_key for trial in trials})
    losses = {
        key: None if found.losses is None else found.losses.tolist() for key, found in done.items()
    }
    return [
        [t.number, t.configuration, t.first_window, t.windows, t.origin,
         losses.get(t.evaluation_key)]
        for t in trials
    ]  # fmt: skip


def undisturbed(plan: Plan) -> list[Any]:
    """The path of a study in this process, without a pause."""
    with tempfile.TemporaryDirectory() as name:
        store = Store.open(Path(name) / "studies.db")
        pool = InProcessPool(Simulated(plan.sites, 0.0, "").evaluate)
        run(plan, store, pool, Path(name) / "spool")
        pool.close()
        found = path_of(store, plan.name)
        store.close()
    return found


def build(spec: Any) -> Callable[[Evaluate], Evaluation]:
    """What a worker of a pool runs."""
    return Simulated(**spec["simulated"]).evaluate


@contextmanager
def pool_of(driver: dict[str, Any]) -> Iterator[Pool]:
    """The pool of a driver: Ray workers, or this process."""
    evaluator = dict(sites=driver["sites"], seconds=driver["seconds"], log=driver["log"])
    pool: Pool
    if driver["workers"] == 0:
        pool = InProcessPool(Simulated(**evaluator).evaluate)
    else:
        spec: Any = {"simulated": evaluator, "threads": 1}
        patience = Patience(floor_seconds=driver["patience"], enough=1, first_seconds=20.0)
        pool = RayPool(spec, driver["workers"], build=build, patience=patience)
    try:
        yield pool
    finally:
        pool.close()


def command(**driver: Any) -> list[str]:
    """What starts a driver in a process of its own; see `main` for what it takes."""
    return [sys.executable, "-P", str(Path(__file__).absolute()), json.dumps(driver)]


def main() -> None:
    """Drive a study: address, name, solver, sites, evaluations, windows; workers, seconds (of an
    evaluation), patience, log, spool; lease (seconds)."""
    driver = json.loads(sys.argv[1])
    sys.modules["simulated"] = sys.modules["__main__"]
    build.__module__ = Simulated.__module__ = "simulated"  # for the workers
    holding.LEASE_SECONDS = driver["lease"]
    plan = Plan(*(driver[key] for key in ("name", "solver", "sites", "evaluations", "windows")))
    with pool_of(driver) as pool:
        run(plan, Store.open(driver["address"]), pool, Path(driver["spool"]))


if __name__ == "__main__":
    main()
