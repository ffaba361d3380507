"""Poisoned and hanging work in real Ray workers: they are killed, and the pool goes on."""

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest

from apportion.errors import ApportionError
from apportion.workers.evaluator import Evaluate, Evaluation
from apportion.workers.patience import Patience
from apportion.workers.ray_pool import RayPool
from apportion.workers.spec import WorkerSpec
from apportion.workers.watchdog import marked

from .conftest import ends

# Its behavior is in the configuration: `act`, and a file `once` that the first try takes away.
SIMULATED = """
import os, signal, subprocess, time
from pathlib import Path
import numpy as np
from apportion.workers.evaluator import Evaluation

class Simulated:
    def __init__(self, folder):
        self.folder = folder

    def evaluate(self, work):
        (self.folder / "pid").write_text(f"{os.getpid()}\\n")
        once = work.configuration.get("once")
        if once is None or taken(self.folder / once):
            getattr(self, work.configuration.get("act", "work"))()
        return Evaluation(np.ones(work.windows), np.ones(work.windows), None, 0.0)

    def work(self): pass
    def slow(self): time.sleep(0.5)
    def hang(self): signal.pause()
    def stop(self): os.kill(os.getpid(), signal.SIGSTOP)
    def die(self): os.kill(os.getpid(), signal.SIGKILL)
    def quit(self): raise SystemExit
    def wait_for_child(self):
        child = subprocess.Popen(["sleep", "3600"])
        (self.folder / "child").write_text(str(child.pid))
        child.wait()
    def eat(self):
        hoard = []
        while len(hoard) < 256:
            hoard.append(b"x" * 2**24)
        signal.pause()

def taken(file):
    try:
        file.unlink()
    except FileNotFoundError:
        return False
    return True

def build(spec):
    if (Path(spec["base"]) / "broken").exists():
        os.kill(os.getpid(), signal.SIGKILL)
    return Simulated(Path(spec["base"])).evaluate
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("simulated")


@pytest.fixture(scope="module")
def pool(spec: WorkerSpec, folder: Path) -> Iterator[RayPool]:
    (folder / "simulated.py").write_text(SIMULATED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder))
        patch.syspath_prepend(folder)
        from simulated import build  # type: ignore[import-not-found]

        patience = Patience(floor_seconds=4, factor=3, first_seconds=4)
        made = RayPool(
            spec | {"base": str(folder)},
            workers=2,
            build=build,
            patience=patience,
            memory_bytes=800 * 10**6,
            together=1,  # what is lost is counted here
        )
    yield made
    made.close()


def act(pool: RayPool, what: str, **options: str) -> "Future[Evaluation]":
    return pool.submit(Evaluate({"act": what, **options}, "search", 0, 4))


def changes(pool: RayPool, before: dict[str, tuple[int, float]]) -> dict[str, int]:
    counts = {name: count - before[name][0] for name, (count, _) in pool.bill.entries().items()}
    return {name: count for name, count in counts.items() if count}


@pytest.mark.parametrize(
    ("what", "error_class", "told"),
    [
        ("hang", "timeout", "took longer than 4 s twice; evaluations like it take "),
        ("stop", "timeout", "took longer than 4 s twice"),
        ("die", "died", "its worker died of it twice"),
        ("quit", "died", "its worker died of it twice"),
        ("eat", "memory", "its worker took more than 800 MB of memory twice"),
    ],
)
def test_poison_is_a_failure_and_the_pool_goes_on(
    pool: RayPool, what: str, error_class: str, told: str
) -> None:
    for _ in range(5):
        act(pool, "work").result(60)
    before = pool.bill.entries()
    poisoned, healthy = act(pool, what), [act(pool, "slow") for _ in range(3)]
    result = poisoned.result(120)
    assert result.error_class == error_class
    assert str(result.failure).startswith(told)
    assert result.losses is None and result.seconds > 0
    assert [future.result(60).failure for future in healthy] == [None] * 3
    assert changes(pool, before) == {error_class: 2, "done": 3}


@pytest.mark.parametrize(
    ("what", "outcome"), [("hang", "timeout"), ("die", "died"), ("eat", "memory")]
)
def test_work_that_is_lost_once_is_done_by_another_worker(
    pool: RayPool, folder: Path, what: str, outcome: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "marker").touch()
    before = pool.bill.entries()
    future = act(pool, what, once="marker")
    assert future.result(120).failure is None
    assert changes(pool, before) == {outcome: 1, "done": 1}
    assert capsys.readouterr() == ("", "")


def test_bill_is_the_time_that_workers_were_busy(pool: RayPool, folder: Path) -> None:
    """One work at a time: so they are busy from its submission to its result."""
    busy, before = 0.0, pool.bill.busy_seconds
    wasted = pool.bill.wasted_seconds
    for number, what in enumerate(("slow", "hang", "slow", "die", "slow")):
        (folder / f"marker{number}").touch()
        begun = time.monotonic()
        assert act(pool, what, once=f"marker{number}").result(120).failure is None
        busy += time.monotonic() - begun
    assert pool.bill.busy_seconds - before == pytest.approx(busy, rel=0.02)
    assert 4 < pool.bill.wasted_seconds - wasted < busy


def test_worker_that_is_killed_at_rest_blames_nobody(pool: RayPool, folder: Path) -> None:
    act(pool, "work").result(60)
    before = pool.bill.entries()
    process = psutil.Process(int((folder / "pid").read_text()))
    process.kill()
    process.wait(30)
    futures = [act(pool, "slow") for _ in range(4)]
    assert [future.result(60).failure for future in futures] == [None] * 4
    assert changes(pool, before) == {"died": 1, "done": 4}


def test_what_hanging_work_started_ends_with_it(pool: RayPool, folder: Path) -> None:
    (folder / "marker").touch()
    assert act(pool, "wait_for_child", once="marker").result(120).failure is None
    assert ends(int((folder / "child").read_text()))


def test_worker_that_cannot_be_replaced_is_an_error(pool: RayPool, folder: Path) -> None:
    (folder / "broken").touch()
    with pytest.raises(ApportionError, match="a worker died when it was started"):
        act(pool, "die").result(120)
    (folder / "broken").unlink()
    futures = [act(pool, "slow") for _ in range(3)]
    assert [future.result(60).failure for future in futures] == [None] * 3


def test_closing_ends_a_stopped_worker_and_bills_it(pool: RayPool, folder: Path) -> None:
    """The last test: it closes the pool of this file."""
    before = pool.bill.entries()
    assert marked(str(pool._folder))
    (folder / "pid").unlink()
    stopped, waiting = act(pool, "hang"), [act(pool, "hang") for _ in range(3)]
    deadline = time.monotonic() + 30
    while not (folder / "pid").exists() or not (folder / "pid").read_text().endswith("\n"):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(int((folder / "pid").read_text()), signal.SIGSTOP)
    begun = time.monotonic()
    pool.close()
    assert time.monotonic() - begun < 20
    with pytest.raises(ApportionError, match="the pool was closed"):
        stopped.result(1)
    assert waiting[-1].cancelled()
    assert changes(pool, before) == {"cancelled": 2}
    assert not marked(str(pool._folder))
    with pytest.raises(ApportionError, match="closed"):
        act(pool, "work")
