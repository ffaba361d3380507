"""The contract of pools, the same for each of them; and what only processes can do."""

import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from pathlib import Path

import numpy as np
import pytest

from apportion.workers.evaluator import Evaluate, Evaluation
from apportion.workers.patience import Patience
from apportion.workers.pool import InProcessPool, Pool
from apportion.workers.ray_pool import RayPool
from apportion.workers.spec import WorkerSpec, build_evaluator

DOWN = "model.layers.{}.mlp.down_proj"
WORK = [Evaluate({DOWN.format(k % 3): "s50%"}, "search", k, 8) for k in range(6)]
# A loss whose behavior the test steers by files beside it.
LOSS = """
import os, sys, time
from pathlib import Path
here = Path(__file__).parent
def loss(output, batch, reference):
    (here / "path.txt").write_text("\\n".join([os.getcwd(), *sys.path]))
    (here / "threads.txt").write_text(os.environ.get("OMP_NUM_THREADS", ""))
    if (here / "raise_once").exists():
        (here / "raise_once").unlink()
        raise ValueError("once")
    if (here / "raise").exists():
        raise ValueError("always")
    if (here / "hang").exists():
        (here / "hang").rename(here / "hung")
        (here / "pid").write_text(str(os.getpid()))
        time.sleep(3600)
    windows = len(output.logits)
    if (here / "slow").exists():
        time.sleep(0.2)
    if (here / "nan").exists():
        return [float("nan")] * windows, [1.0] * windows
    return (output.logits - reference.logits).square().sum((-1, -2)), [1.0] * windows
"""


@pytest.fixture(scope="module")
def steered(spec: WorkerSpec, tmp_path_factory: pytest.TempPathFactory) -> WorkerSpec:
    folder = tmp_path_factory.mktemp("steered")
    (folder / "loss.py").write_text(LOSS)
    return spec | {"objective": f"python:{folder / 'loss.py'}:loss"}


def folder_of(steered: WorkerSpec) -> Path:
    return Path(steered["objective"].split(":")[1]).parent


@pytest.fixture(scope="module", params=["in process", "ray"])
def pool(request: pytest.FixtureRequest, steered: WorkerSpec) -> Iterator[Pool]:
    made: Pool
    if request.param == "ray":
        made = RayPool(steered, workers=2)
    else:
        made = InProcessPool(build_evaluator(steered).evaluate)
    yield made
    made.close()


def wait_for(condition: Callable[[], bool], seconds: float = 30) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


def test_results_are_those_of_an_evaluator(pool: Pool, steered: WorkerSpec) -> None:
    futures = [pool.submit(work) for work in WORK]
    evaluator = build_evaluator(steered)
    for work, future in zip(WORK, futures, strict=True):
        got, expected = future.result(60), evaluator.evaluate(work)
        np.testing.assert_array_equal(got.losses, expected.losses)
        np.testing.assert_array_equal(got.weights, expected.weights)


def test_raising_once_is_no_failure(pool: Pool, steered: WorkerSpec) -> None:
    (folder_of(steered) / "raise_once").touch()
    assert pool.submit(WORK[0]).result(60).failure is None
    assert not (folder_of(steered) / "raise_once").exists()


def test_raising_twice_is_a_failure(pool: Pool, steered: WorkerSpec) -> None:
    (folder_of(steered) / "raise").touch()
    result = pool.submit(WORK[0]).result(60)
    (folder_of(steered) / "raise").unlink()
    assert result.losses is None
    assert "ValueError: always" in str(result.failure)
    assert result.error_class == "raised"
    assert pool.submit(WORK[0]).result(60).failure is None


def test_loss_that_is_not_finite_is_a_failure(pool: Pool, steered: WorkerSpec) -> None:
    (folder_of(steered) / "nan").touch()
    result = pool.submit(WORK[0]).result(60)
    (folder_of(steered) / "nan").unlink()
    assert result.error_class == "not finite"
    assert "is not finite" in str(result.failure)


def test_bill_counts_what_was_done_and_what_failed(pool: Pool, steered: WorkerSpec) -> None:
    """One work at a time: so its worker is busy from its submission to its result."""
    (folder_of(steered) / "slow").touch()
    before, busy = pool.bill.entries(), 0.0
    wrong = Evaluate({"no.such.site": "drop"}, "search", 0, 4)
    for work in (wrong, *WORK):
        begun = time.monotonic()
        result = pool.submit(work).result(60)
        busy += time.monotonic() - begun
        assert (result.error_class is None) == (work is not wrong)
    (folder_of(steered) / "slow").unlink()
    after = pool.bill.entries()
    gained = {name: (n - before[name][0], s - before[name][1]) for name, (n, s) in after.items()}
    assert (gained["done"][0], gained["failed"][0]) == (6, 1)
    assert sum(seconds for _, seconds in gained.values()) == pytest.approx(busy, rel=0.02)


def test_wrong_work_is_a_failure(pool: Pool) -> None:
    failure = pool.submit(Evaluate({"no.such.site": "drop"}, "search", 0, 4)).result(60).failure
    assert "no.such.site" in str(failure)


def test_killed_worker_is_replaced_and_its_work_redone(pool: Pool, steered: WorkerSpec) -> None:
    if isinstance(pool, InProcessPool):
        pytest.skip("a pool in this process has nothing to kill")
    folder = folder_of(steered)
    expected = pool.submit(WORK[1]).result(60)
    (folder / "hang").touch()
    recoveries = pool.recoveries
    future = pool.submit(WORK[1])
    assert wait_for((folder / "pid").exists)
    wait_for(lambda: bool((folder / "pid").read_text()))
    os.kill(int((folder / "pid").read_text()), signal.SIGKILL)
    np.testing.assert_array_equal(future.result(60).losses, expected.losses)
    assert pool.recoveries == recoveries + 1


def test_workers_have_their_threads_and_no_checkout(pool: Pool, steered: WorkerSpec) -> None:
    if isinstance(pool, InProcessPool):
        pytest.skip("a pool in this process has this process's path")
    pool.submit(WORK[0]).result(60)
    root = Path(__file__).resolve().parents[2]
    path = (folder_of(steered) / "path.txt").read_text().splitlines()
    assert root not in [Path(entry).resolve() for entry in path]
    assert (folder_of(steered) / "threads.txt").read_text() == "1"


def test_nothing_listens_beyond_this_machine(
    pool: Pool, descendants: Callable[[int], set[int]]
) -> None:
    if isinstance(pool, InProcessPool):
        pytest.skip("a pool in this process does not listen")
    links = [os.readlink(link) for p in descendants(os.getpid()) for link in _descriptors(p)]
    listening = {_socket(row) for family in ("tcp", "tcp6") for row in _listeners(family)}
    ours = [address for inode, address in listening if f"socket:[{inode}]" in links]
    assert ours
    assert all(address.endswith("0100007F") for address in ours)


def _descriptors(pid: int) -> Iterator[Path]:
    return (link for link in Path(f"/proc/{pid}/fd").iterdir() if link.is_symlink())


def _listeners(family: str) -> list[list[str]]:
    rows = [line.split() for line in Path(f"/proc/net/{family}").read_text().splitlines()[1:]]
    return [row for row in rows if row[3] == "0A"]


def _socket(row: list[str]) -> tuple[str, str]:
    return row[9], row[1].partition(":")[0]


def test_close_cancels_what_waits_and_may_be_repeated(spec: WorkerSpec) -> None:
    pool = InProcessPool(lambda work: time.sleep(0.3))  # type: ignore[arg-type, return-value]
    first, second = pool.submit(WORK[0]), pool.submit(WORK[1])
    wait_for(first.running, 5)
    pool.close()
    pool.close()
    assert first.done()
    with pytest.raises(CancelledError):
        second.result(1)


def test_overdue_work_in_this_process_is_told_once() -> None:
    told: queue.SimpleQueue[tuple[Evaluate, float, float]] = queue.SimpleQueue()
    released = threading.Event()

    def evaluate(work: Evaluate) -> Evaluation:
        if work is WORK[0]:
            released.wait(30)
        return Evaluation(np.ones(8), np.ones(8), None, 0.0)

    pool = InProcessPool(
        evaluate,
        patience=Patience(floor_seconds=0.2, first_seconds=0.2),
        on_overdue=lambda *overdue: told.put(overdue),
    )
    assert pool.submit(WORK[1]).result(10).failure is None
    hanging = pool.submit(WORK[0])
    work, seconds, limit = told.get(timeout=10)
    assert work is WORK[0]
    assert limit == 0.2 <= seconds
    released.set()
    assert hanging.result(10).failure is None
    pool.close()
    assert told.empty()
    assert pool.bill.entries()["done"][0] == 2


def test_close_leaves_no_timer_of_work_that_hangs() -> None:
    released, begun = threading.Event(), threading.Event()

    def evaluate(work: Evaluate) -> Evaluation:
        begun.set()
        released.wait(30)
        return Evaluation(np.ones(8), np.ones(8), None, 0.0)

    pool = InProcessPool(evaluate, on_overdue=lambda *overdue: None)
    pool.submit(WORK[0])
    assert begun.wait(10)
    assert any(isinstance(thread, threading.Timer) for thread in threading.enumerate())
    pool.close()
    assert not any(isinstance(thread, threading.Timer) for thread in threading.enumerate())
    assert pool.bill.entries()["cancelled"][0] == 1
    released.set()
