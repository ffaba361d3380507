"""Workers on the nodes of a cluster: what is lost with them, and who is to blame."""

import os
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest

from apportion.errors import ApportionError, InvalidInput
from apportion.workers.cluster_pool import ClusterPool
from apportion.workers.evaluator import Evaluate, Evaluation
from apportion.workers.patience import Patience
from apportion.workers.ray_cluster import RayCluster
from apportion.workers.spec import WorkerSpec

from .conftest import ends

STORE_BYTES = 80 * 1024**2
# Its behavior is in the configuration; which node it is on, in the node's environment.
ACTING = """
import os, signal, time
from pathlib import Path
import numpy as np
from apportion.errors import ApportionError, InvalidInput
from apportion.workers.evaluator import Evaluation

class Acting:
    def __init__(self, folder):
        self.folder = folder

    def evaluate(self, work):
        (self.folder / "pid").write_text(f"{os.getpid()}\\n")
        getattr(self, work.configuration.get("act", "work"))()
        return Evaluation(np.ones(work.windows), np.ones(work.windows), None, 0.001)

    def work(self): pass
    def wait(self):
        while not (self.folder / "go_on").exists():
            time.sleep(0.02)
    def stop(self): os.kill(os.getpid(), signal.SIGSTOP)
    def die(self): os.kill(os.getpid(), signal.SIGKILL)

def build(spec):
    if os.environ.get("LACKING"):
        raise InvalidInput("model.source: no folder /model")
    return Acting(Path(spec["base"])).evaluate
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("acting")


@pytest.fixture(scope="module")
def machines(folder: Path) -> Iterator[Any]:
    """A head without processors."""
    (folder / "acting.py").write_text(ACTING)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        # read when ray is imported, for this process and its later pools
        patch.setenv("RAY_DEDUP_LOGS_SKIP_REGEX", ".*")
        patch.setenv("PYTHONPATH", str(folder))
        patch.syspath_prepend(folder)
        from ray.cluster_utils import Cluster

        head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": STORE_BYTES}
        made = Cluster(initialize_head=True, head_node_args=head)
        yield made
        made.shutdown()


@pytest.fixture
def node(machines: Any) -> Iterator[Callable[..., Any]]:
    """Adds a node with one processor; all are removed at the end."""

    def add(**variables: str) -> Any:
        return machines.add_node(
            num_cpus=1, object_store_memory=STORE_BYTES, env_vars=variables or None
        )

    yield add
    for left in list(machines.worker_nodes):
        machines.remove_node(left)


@pytest.fixture
def told() -> list[str]:
    return []


@pytest.fixture
def cluster(machines: Any, told: list[str]) -> Iterator[RayCluster]:
    joined = RayCluster(machines.address, 1, told.append)
    yield joined
    joined.leave()
    assert len(machines.global_state._live_node_ids()) == 1 + len(machines.worker_nodes)


@pytest.fixture
def pool_of(
    cluster: RayCluster, spec: WorkerSpec, folder: Path, told: list[str]
) -> Iterator[Callable[[int], ClusterPool]]:
    from acting import build  # type: ignore[import-not-found]

    pools = []

    def make(workers: int) -> ClusterPool:
        patience = Patience(floor_seconds=3, factor=3, first_seconds=3)
        here = spec | {"base": str(folder)}
        made = ClusterPool(cluster, here, workers, told.append, build=build, patience=patience)
        pools.append(made)
        return made

    for file in ("pid", "go_on"):
        (folder / file).unlink(missing_ok=True)
    yield make
    for pool in pools:
        pool.close()


def act(pool: ClusterPool, what: str) -> "Future[Evaluation]":
    return pool.submit(Evaluate({"act": what}, "search", 0, 4))


def counts(pool: ClusterPool) -> dict[str, int]:
    return {name: count for name, (count, _) in pool.bill.entries().items() if count}


def begun(folder: Path) -> int:
    """Id of the process that works."""
    deadline = time.monotonic() + 60
    file = folder / "pid"
    while not file.exists() or not file.read_text().endswith("\n"):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return int(file.read_text())


@pytest.mark.parametrize(("what", "outcome"), [("die", "died"), ("stop", "timeout")])
def test_poison_on_another_node_is_blamed(
    node: Any, pool_of: Any, folder: Path, what: str, outcome: str
) -> None:
    """What a stopped process holds is given back too."""
    node()
    pool = pool_of(1)
    result = act(pool, what).result(120)
    assert (result.error_class, counts(pool)) == (outcome, {outcome: 2})
    poisoned = begun(folder)
    assert act(pool, "work").result(60).failure is None
    assert ends(poisoned)


def test_work_is_not_blamed_for_its_node(
    node: Any, pool_of: Any, machines: Any, folder: Path, told: list[str]
) -> None:
    """Three times: twice would make it a failure. It waits for the node that joins."""
    leaving, pool = node(), pool_of(1)
    future = act(pool, "wait")
    for losses in range(1, 4):
        begun(folder)
        (folder / "pid").unlink()
        machines.remove_node(leaving)
        leaving = node()
        begun(folder)
        assert counts(pool) == {"died": losses}
    (folder / "go_on").touch()
    assert future.result(60).failure is None
    gone = f"node {socket.gethostname()} is gone; its work is done by others"
    # where the next node is slow to come, it is also told that there is none
    assert [text for text in told if not text.startswith("no worker is alive")] == [gone] * 3


def test_pool_goes_on_with_the_workers_that_have_room(node: Any, pool_of: Any) -> None:
    node()
    pool = pool_of(3)
    futures = [act(pool, "work") for _ in range(20)]
    assert [future.result(60).failure for future in futures] == [None] * 20
    assert counts(pool) == {"done": 20}


def test_worker_killed_at_rest_blames_nobody(node: Any, pool_of: Any, folder: Path) -> None:
    node()
    pool = pool_of(1)
    act(pool, "work").result(60)
    process = psutil.Process(begun(folder))
    process.kill()
    process.wait(30)
    assert act(pool, "work").result(60).failure is None
    assert counts(pool) == {"died": 1, "done": 2}


def test_short_work_is_sent_together_and_poison_among_it_is_found(node: Any, pool_of: Any) -> None:
    node()
    pool = pool_of(1)
    act(pool, "work").result(60)
    futures = [act(pool, what) for what in ("work",) * 6 + ("die",) + ("work",) * 9]
    classes = [future.result(120).error_class for future in futures]
    assert classes == [None] * 6 + ["died"] + [None] * 9
    found = counts(pool)
    assert found["done"] == 16
    assert found["died"] == 3  # with those that were sent with it, then twice alone


def test_node_that_lacks_something_is_left_out(node: Any, pool_of: Any, told: list[str]) -> None:
    node(LACKING="1")
    node()
    pool = pool_of(2)
    assert act(pool, "work").result(60).failure is None
    deadline = time.monotonic() + 30
    while not told:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    name = socket.gethostname()
    assert told == [f"node {name}: model.source: no folder /model; no worker runs there"]


def test_node_that_rounds_otherwise_is_left_out(node: Any, pool_of: Any) -> None:
    node(ATEN_CPU_CAPABILITY="default")
    with pytest.raises(ApportionError, match="it computes with torch .* DEFAULT, the driver with"):
        act(pool_of(1), "work").result(60)


def test_cluster_without_a_fit_node_is_an_error(node: Any, pool_of: Any) -> None:
    node(LACKING="1")
    pool = pool_of(2)
    with pytest.raises(InvalidInput, match="node .*: model.source: no folder /model"):
        act(pool, "work").result(60)
    with pytest.raises(InvalidInput, match="no folder /model"):
        act(pool, "work")


def test_device_on_two_nodes_is_refused(machines: Any, node: Any, cluster: RayCluster) -> None:
    node()
    assert cluster.node_of("here") is None
    for _ in range(2):
        machines.add_node(
            num_cpus=0, resources={"device:here": 1.0}, object_store_memory=STORE_BYTES
        )
    with pytest.raises(InvalidInput, match="2 nodes of the cluster"):
        cluster.node_of("here")


def test_workers_end_with_the_pool_and_the_cluster_does_not(
    node: Any, pool_of: Any, folder: Path, descendants: Callable[[int], set[int]]
) -> None:
    """The `cluster` fixture looks at the nodes."""
    node()
    pool = pool_of(1)
    future = act(pool, "wait")
    process = psutil.Process(begun(folder))
    assert process.pid in descendants(os.getpid())
    pool.close()
    process.wait(30)
    assert future.done()
