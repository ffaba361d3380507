"""What runs in a worker process.

A cluster's nodes get this class with the work, not from their own installation: so a node that
lacks the package, or has another version of it, can say so. Hence the imports in the methods.
"""

import os
import socket
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from typing import Any, NamedTuple


class Whereabouts(NamedTuple):
    """Where a worker process runs.

    Attributes:
        node: Ray's id of the node.
        machine: the host's name and the id of its boot.
        version: of the package there; None: it is not installed.
        arithmetic: what the bits of a loss depend on there.
    """

    node: str
    pid: int
    host: str
    machine: str
    version: str | None
    arithmetic: str


def machine_name() -> str:
    """Tells this machine, or container, from others."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            boot = file.read().strip()
    except OSError:  # not Linux
        boot = ""
    return f"{socket.gethostname()} {boot}"


def arithmetic() -> str:
    """Torch's version and the instructions that it uses. Raises ImportError without torch."""
    import platform

    import torch

    return (
        f"torch {torch.__version__} {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    )


class EvaluatorActor:
    """A process with an evaluator."""

    def where(self) -> Whereabouts:
        """Where it is, and what is installed there."""
        import ray

        version, computes = None, ""
        with suppress(ImportError):
            from apportion import __version__

            version, computes = __version__, arithmetic()
        node, host = ray.get_runtime_context().get_node_id(), socket.gethostname()
        return Whereabouts(node, os.getpid(), host, machine_name(), version, computes)

    def build(
        self, spec: Any, make: Callable[[Any], Any], index: bytes | None = None, driver: Any = None
    ) -> None:
        """Make what does the work.

        Args:
            spec: a `WorkerSpec`.
            make: makes a function of it that does one work.
            index: the bank's index, where this is a cluster's node.
            driver: `Whereabouts` of the driver, likewise.
        """
        self._lock: Callable[[], Any] = nullcontext
        if driver is not None:
            from apportion.workers.node_home import localized

            spec = localized(spec, index, driver.node)
            # The driver itself holds the lock of its own machine.
            if machine_name() != driver.machine:
                self._lock = _beside_others
        self._do = make(spec)

    def here(self) -> None:
        """Answers as soon as the process is free."""

    def run(self, works: Sequence[Any]) -> list[Any] | None:
        """Do it; an exception becomes a failure. None: this machine is being timed on."""
        from apportion.workers.pool import attempt

        try:
            with self._lock():
                return [attempt(self._do, work) for work in works]
        except TimeoutError:
            return None


def _beside_others() -> Any:
    """The shared lock of this machine's processor; TimeoutError where it is timed on."""
    import time

    from apportion.workers.device_lock import processor_lock

    deadline = time.monotonic() + 5.0

    def wait() -> None:
        if time.monotonic() > deadline:
            raise TimeoutError

    return processor_lock().shared(wait)
