"""A study on a Ray cluster whose nodes come and go ends where it ends on one machine."""

import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from apportion.cost_models.fingerprint import fingerprint, fingerprint_hash
from apportion.studies.database.store import Store
from apportion.studies.home import Home

Journey = Any
LONGEST_S = 180.0
STORE_BYTES = 80 * 1024**2
LOOPBACK = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".*",
}
FAR = """
[devices.far]
kind = "cpu"
threads = 1
request = [{ phase = "forward", batch = 1 }]
[limits]
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head without processors, where the driver is."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in LOOPBACK.items():
            patch.setenv(name, value)
        from ray.cluster_utils import Cluster

        head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": STORE_BYTES}
        made = Cluster(initialize_head=True, head_node_args=head)
        yield made
        made.shutdown()


@pytest.fixture
def node(cluster: Any) -> Iterator[Callable[..., Any]]:
    """Adds a node with one processor; all are removed at the end."""

    def add(**options: Any) -> Any:
        return cluster.add_node(num_cpus=1, object_store_memory=STORE_BYTES, **options)

    yield add
    for left in list(cluster.worker_nodes):
        cluster.remove_node(left)


def until(condition: Callable[[], Any], process: "subprocess.Popen[str]") -> Any:
    """Wait until something holds, while the process lives."""
    deadline = time.monotonic() + LONGEST_S
    while time.monotonic() < deadline and process.poll() is None:
        if found := condition():
            return found
        time.sleep(0.05)
    raise AssertionError(f"waited in vain: {process.poll()}")


def on(cluster: Any) -> tuple[str, str]:
    return "--ray", cluster.address


IMPORTS = """import os
import sys
import time
from pathlib import Path

import torch
"""
SLOW = """        held = Path(__file__).with_name("held")
        while held.exists() and os.environ.get("NODE") in ("first", "second"):
            time.sleep(0.02)
        if Path(__file__).with_name("slow").exists():
            time.sleep(0.1)
        for block in self.blocks:
"""
NAMED = """    with Path(__file__).with_name("built").open("a") as file:
        program = getattr(sys.modules["__main__"].__spec__, "name", "")
        file.write(f"{os.environ.get('NODE', 'none')} {program}\\n")
    return Tiny()
"""


def watched(journey: Journey) -> None:
    """Workers are slow while the file `slow` is there, two nodes wait while `held` is; who builds
    the model leaves its name."""
    journey.edit("model.py", "import torch\n", IMPORTS)
    journey.edit("model.py", "        for block in self.blocks:\n", SLOW)
    journey.edit("model.py", "    return Tiny()\n", NAMED)


def untimed(path: dict[str, Any]) -> dict[str, Any]:
    """Without what the clock says: the measured latencies of a device."""
    for point in [*path["report"]["front"], *path["report"]["uniform"]]:
        point["latency_ms"]["far"] = None
    return path


def measurements_from(journey: Journey, other: Journey) -> None:
    """Stored measurements are never taken again: both studies see the same device."""
    device = fingerprint_hash(fingerprint(1))
    found = Store.open(other.home / "studies.db")
    taken = found.measurements(device)
    found.close()
    assert taken
    store = Store.open(Home(journey.home).create().database)
    store.record_measurements(device, taken)
    store.close()


def test_nodes_come_and_go(
    node: Callable[..., Any], cluster: Any, journey: Journey, tmp_path: Path
) -> None:
    """One is removed and one added in mid-study; the device is on one only; one lacks the bank."""
    journey.edit("study.toml", "[limits]\n", FAR)
    watched(journey)
    one_node = type(journey)(tmp_path / "same", tmp_path / "one-node")
    shutil.copytree(journey.folder, one_node.folder)
    elsewhere = tmp_path / "elsewhere"
    held, slow = journey.folder / "held", journey.folder / "slow"
    node(resources={"device:far": 1.0}, env_vars={"NODE": "first"})
    node(env_vars={"NODE": "second", "APPORTION_HOME": str(elsewhere)})
    leaving = node(env_vars={"NODE": "third"})
    with journey.process("submit", journey.study, *on(cluster), "--workers", 3) as process:
        until(lambda: [row for row in journey.listed() if row["stage"] == "search"], process)
        slow.touch()
        held.touch()
        until(lambda: journey.evaluated() > 5, process)  # by the third, which is at work
        cluster.remove_node(leaving, allow_graceful=False)
        held.unlink()
        until(lambda: journey.evaluated() > 15, process)
        node(env_vars={"NODE": "fourth"})
        until(lambda: "fourth " in (journey.folder / "built").read_text(), process)
        slow.unlink()
        out, error = process.communicate(timeout=LONGEST_S)
    assert (process.returncode, error) == (0, "")
    assert "is gone; its work is done by others" in out
    built = (journey.folder / "built").read_text().splitlines()
    timed = [line.split()[0] for line in built if line.endswith("apportion.workers.timing")]
    assert timed == ["first", "first"]  # profiled, and at last compared
    assert list(elsewhere.glob("bank/*/*.safetensors"))
    measurements_from(one_node, journey)
    ended = one_node.submit()
    assert (ended.status, ended.error) == (0, ""), ended.out + ended.error
    assert untimed(journey.path()) == untimed(one_node.path())


def statistics(home: Path) -> dict[str, bytes]:
    """Name of a block's file -> what it holds."""
    return {file.name: file.read_bytes() for file in home.glob("cache/calibration-*")}


def test_node_calibrates_and_the_driver_has_it(
    node: Callable[..., Any], cluster: Any, journey: Journey, finished: Journey, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    node(env_vars={"APPORTION_HOME": str(elsewhere)})
    with journey.process("submit", journey.study, *on(cluster), "--workers", 2) as process:
        _, error = process.communicate(timeout=LONGEST_S)
    assert (process.returncode, error) == (0, "")
    assert len(statistics(elsewhere)) == 2
    assert statistics(elsewhere) == statistics(journey.home) == statistics(finished.home)


def test_address_without_a_cluster_leaves_no_study(journey: Journey) -> None:
    ended = journey.run("submit", journey.study, "--ray", "127.0.0.1:1")
    assert (ended.status, len(ended.error.splitlines())) == (2, 1)
    assert "--ray 127.0.0.1:1: no Ray cluster answers there" in ended.error
    assert journey.listed() == []
    ended = journey.run("submit", journey.study, "--ray", "ray://127.0.0.1:10001")
    assert (ended.status, "write HOST:PORT of the head node" in ended.error) == (2, True)


def test_interrupted_study_names_its_cluster(
    node: Callable[..., Any], cluster: Any, journey: Journey, finished: Journey
) -> None:
    """And goes on without it."""
    watched(journey)
    (journey.folder / "slow").touch()
    before = cluster.global_state._live_node_ids()
    node()
    with journey.process("submit", journey.study, *on(cluster), "--workers", 2) as process:
        until(lambda: journey.evaluated() > 3, process)
        process.send_signal(signal.SIGINT)
        out, error = process.communicate(timeout=LONGEST_S)
    assert (process.returncode, error) == (130, "")
    assert out.splitlines()[-1].endswith(f"resume tiny --ray {cluster.address}")
    assert cluster.global_state._live_node_ids() > before
    (journey.folder / "slow").unlink()
    assert journey.run("resume", "tiny").status == 0
    assert journey.path()["trials"] == finished.path()["trials"]
