"""Timing where the device is: a task on the cluster's node that has it, alone there."""

import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from apportion.cost_models.fingerprint import fingerprint
from apportion.errors import ApportionError
from apportion.workers.device_lock import processor_lock
from apportion.workers.node_home import localized
from apportion.workers.node_tasks import time_here
from apportion.workers.ray_calls import Calls, Died
from apportion.workers.ray_cluster import DEVICE, RayCluster
from apportion.workers.spec import WorkerSpec, open_bank, read_index
from apportion.workers.timing import Message, Send, run_timing

POLL_SECONDS = 0.5
WAITING = "waiting"


def fingerprint_on(cluster: RayCluster, node: str, threads: int) -> dict[str, Any]:
    """The fingerprint of a node. Raises ApportionError where it does not answer."""
    task = cluster.ray.remote(fingerprint).options(max_retries=0, **cluster.on_node(node))
    try:
        found: dict[str, Any] = _calls(cluster).wait(task.remote(threads))
    except Died as error:
        raise ApportionError("its node was lost") from error
    return found


def run_timing_on(
    cluster: RayCluster,
    node: str,
    device: str,
    job: Mapping[str, Any],
    threads: int,
    on_message: Send,
    on_wait: Callable[[], None],
    on_step: Callable[[], None],
) -> dict[str, Any]:
    """`run_timing` on a node; it holds the node's resource of the device meanwhile.

    Args:
        on_wait: called several times a second while others evaluate or time on the node.
        on_step: called twice a second at least. What any of the three raises ends the timing.

    Raises:
        InvalidInput, ApportionError: like `run_timing`, or the node was lost.
    """
    index = job["worker"]["index"]
    content = cluster.ray.put(Path(index).read_bytes()) if index else None
    options = cluster.on_node(node) | {"resources": {DEVICE + device: 1.0}, "max_retries": 0}
    task = cluster.ray.remote(time_here).options(num_returns="streaming", **options)
    stream = task.remote(dict(job), content, cluster.here.node, threads)
    calls = _calls(cluster)
    try:
        while True:
            on_step()
            if not cluster.ray.wait([stream], timeout=POLL_SECONDS)[0]:
                continue
            message = calls.answer(next(stream))
            if "result" in message:
                result: dict[str, Any] = message["result"]
                return result
            if WAITING in message:
                on_wait()
            else:
                on_message(message)
    except (Died, StopIteration) as error:
        raise ApportionError(f"the node of '{device}' was lost while it was timed") from error
    finally:
        cluster.ray.cancel(stream, force=True)


def _calls(cluster: RayCluster) -> Calls:
    return Calls(cluster.ray, threading.Event())


def timed(job: dict[str, Any], index: bytes | None, driver: str, threads: int) -> Iterator[Message]:
    """What `run_timing` tells, and at last its result, on the node."""
    spec = localized(job["worker"], index, driver)
    _fetch(spec, job.get("configurations", {}))
    told: SimpleQueue[Message | BaseException] = SimpleQueue()

    def work() -> None:
        try:
            with processor_lock().exclusive(lambda: told.put({WAITING: True})):
                told.put({"result": run_timing({**job, "worker": spec}, threads, told.put)})
        except BaseException as error:  # raised again where it is heard
            told.put(error)

    threading.Thread(target=work, daemon=True).start()
    while True:
        message = told.get()
        if isinstance(message, BaseException):
            raise message
        yield message
        if "result" in message:
            return


def _fetch(spec: WorkerSpec, configurations: Mapping[str, Mapping[str, Any]]) -> None:
    """What the timing process needs of the bank: it is no process of Ray's and cannot fetch."""
    if not spec["index"]:
        return
    bank, index = open_bank(spec), read_index(spec)
    for entry in configurations.values():
        for site, option in entry["configuration"].items():
            if key := index.get(site, {}).get(option):
                bank.ensure(key)
