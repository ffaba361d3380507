"""A Ray cluster that is there already: joined for one run of a study, and left as it was."""

import logging
import os
import socket
import tempfile
import threading
from collections.abc import Callable
from typing import Any

from apportion import __version__
from apportion.errors import ApportionError, InvalidInput
from apportion.workers import ray_actor
from apportion.workers.processes import THREAD_VARIABLES
from apportion.workers.ray_actor import Whereabouts
from apportion.workers.ray_session import keep_quiet

CONNECT_SECONDS = 5.0
DEVICE = "device:"


class RayCluster:
    """This process as a driver in somebody's cluster. It starts and ends nothing but its own.

    Ray ends a driver's workers with the driver, however that ended.

    Attributes:
        ray: the module, joined to the cluster.
        here: where this process is.
    """

    def __init__(self, address: str, threads: int, tell: Callable[[str], None]) -> None:
        """Join.

        Args:
            address: "HOST:PORT" of the head, or "auto": the cluster that runs on this machine.
            threads: intra-op threads of a worker.
            tell: is told, a line each, of nodes that are lost or cannot be used.

        Raises:
            InvalidInput: no cluster there, or this machine is not one of its nodes.
        """
        self.ray = _join(address, threads)
        node = self.ray.get_runtime_context().get_node_id()
        machine, computes = ray_actor.machine_name(), ray_actor.arithmetic()
        host = socket.gethostname()
        self.here = Whereabouts(node, os.getpid(), host, machine, __version__, computes)
        self._tell = tell
        self._lock = threading.Lock()
        self._told: set[str] = set()
        self._unfit: dict[str, ApportionError] = {}
        self._has_fit = False

    def is_alive(self, node: str) -> bool:
        """Whether a node, given by its id, belongs to the cluster."""
        return node in self._alive()

    def is_unfit(self, node: str) -> bool:
        """Whether it was refused."""
        return node in self._unfit

    def options(self) -> dict[str, Any]:
        """Of an actor that is to run on any node that was not refused, the emptiest first."""
        options: dict[str, Any] = {"scheduling_strategy": "SPREAD"}
        if self._unfit:
            options["label_selector"] = {"ray.io/node-id": f"!in({','.join(sorted(self._unfit))})"}
        return options

    def require_same(self, where: Whereabouts) -> None:
        """Raises ApportionError where a worker there would not give the losses of one here."""
        if where.version is None:
            raise ApportionError(
                f"apportion is not installed there: pip install apportion=={__version__}"
            )
        if where.version != __version__:
            raise ApportionError(f"apportion is {where.version} there and {__version__} here")
        if where.arithmetic != self.here.arithmetic:
            raise ApportionError(
                f"it computes with {where.arithmetic}, the driver with {self.here.arithmetic}: "
                "losses would differ in their last digits"
            )

    def on_node(self, node: str) -> dict[str, Any]:
        """Options of a task that takes no processor and is to run on this node."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        return {
            "num_cpus": 0,
            "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False),
        }

    def accept(self) -> None:
        """A worker was built somewhere: what other nodes lack is no reason to give up."""
        self._has_fit = True

    def refuse(self, where: Whereabouts, error: ApportionError) -> None:
        """Have no worker on a node any more. Raises like `require_fit`."""
        told = type(error)(f"node {where.host}: {error}")
        with self._lock:
            is_new = where.node not in self._unfit
            self._unfit[where.node] = told
        self.require_fit()
        if is_new:
            self._tell(f"{told}; no worker runs there")

    def require_fit(self) -> None:
        """Raises the ApportionError of a refusal where all nodes were refused from the start."""
        if not self._unfit or self._has_fit:
            return
        able = {node for node, resources in self._alive().items() if resources.get("CPU")}
        if able <= self._unfit.keys():
            raise next(reversed(self._unfit.values()))

    def lost(self, where: Whereabouts) -> None:
        """Say that a node is gone, once."""
        with self._lock:
            is_new = where.node not in self._told
            self._told.add(where.node)
        if is_new:
            self._tell(f"node {where.host} is gone; its work is done by others")

    def node_of(self, device: str) -> str | None:
        """Id of the node that the cluster's resources say has the device; None: it is here.

        Raises:
            InvalidInput: several nodes have it.
        """
        nodes = [node for node, resources in self._alive().items() if DEVICE + device in resources]
        if len(nodes) > 1:
            raise InvalidInput(
                f'{len(nodes)} nodes of the cluster have the resource "{DEVICE}{device}"; '
                "a device is in one place: start Ray with it on one of them"
            )
        return nodes[0] if nodes else None

    def leave(self) -> None:
        """End this driver's part. May be called again."""
        self.ray.shutdown()

    def _alive(self) -> dict[str, dict[str, float]]:
        """Id of each node -> its resources."""
        return {n["NodeID"]: n["Resources"] for n in self.ray.nodes() if n["Alive"]}


def _join(address: str, threads: int) -> Any:
    """The module `ray`. Raises InvalidInput."""
    _refuse_unreachable(address)
    keep_quiet()
    import ray
    from ray import cloudpickle

    if ray.is_initialized():
        raise InvalidInput(f"--ray {address}: Ray is running in this process already")
    cloudpickle.register_pickle_by_value(ray_actor)
    # Ray puts its working directory on the workers' import path: it must be an empty one.
    with tempfile.TemporaryDirectory(prefix="ap-") as empty:
        try:
            ray.init(
                address=address,
                log_to_driver=False,
                logging_level=logging.ERROR,
                runtime_env={
                    "working_dir": empty,
                    "env_vars": dict.fromkeys(THREAD_VARIABLES, str(threads)),
                },
            )
        except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            told = " ".join(str(error).split())[:300]
            raise InvalidInput(f"--ray {address}: the cluster cannot be joined: {told}") from error
    return ray


def _refuse_unreachable(address: str) -> None:
    """Ray itself tries for a minute before it says so."""
    if address == "auto":
        return
    host, colon, port = address.rpartition(":")
    if "/" in address or not (colon and host and port.isdecimal()):
        raise InvalidInput(
            f'--ray {address}: write HOST:PORT of the head node, or "auto" on a machine where Ray '
            "runs; a machine outside the cluster joins it with: "
            "ray start --address=HOST:PORT --num-cpus=0"
        )
    try:
        socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise InvalidInput(f"--ray {address}: no Ray cluster answers there: {error}") from error
