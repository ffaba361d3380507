"""A pool of evaluators on the nodes of a Ray cluster, which may join and leave meanwhile."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

from apportion.workers.bill import Bill
from apportion.workers.cluster_worker import ClusterWorker
from apportion.workers.memory import share_bytes
from apportion.workers.patience import Patience
from apportion.workers.presence import Presence
from apportion.workers.ray_cluster import RayCluster
from apportion.workers.ray_worker import Build
from apportion.workers.resident import ResidentWatch
from apportion.workers.slots import Slots
from apportion.workers.spec import WorkerSpec, build_beside_others
from apportion.workers.work import ResultOf, Work

CLOSE_SECONDS = 5.0
NOBODY = "no worker is alive: no node of the cluster has a free processor; the study waits for one"


class ClusterPool:
    """Evaluators wherever the cluster has a free processor.

    It does not wait for them: work is done as soon as one is there. One that is lost with its node
    is replaced on another, and where none has room, by the next node that joins; no work is blamed
    for that. The seconds of a replacement are not on the bill.
    """

    def __init__(
        self,
        cluster: RayCluster,
        spec: WorkerSpec,
        workers: int,
        tell: Callable[[str], None],
        *,
        build: Build = build_beside_others,
        patience: Patience | None = None,
        memory_bytes: int | None = None,
    ) -> None:
        """Ask the cluster for workers.

        Args:
            cluster: is neither started nor ended here.
            spec: what a worker is made of, as on this machine.
            workers: how many.
            tell: is told when no worker has been alive for a while.
            build: makes what does a worker's work; a function that a worker can import.
            patience: gives the time limit of an evaluation.
            memory_bytes: the most that a worker on this machine may take, mapped files apart; by
                default an equal share of its memory.
        """
        self.bill = Bill()
        self._closing = threading.Event()
        self._resident = ResidentWatch(memory_bytes or share_bytes(workers))
        patience = patience or Patience()
        presence = Presence(tell, NOBODY)
        index = cluster.ray.put(Path(spec["index"]).read_bytes()) if spec["index"] else None
        self._workers = [
            ClusterWorker(
                cluster, spec, build, index, patience, self._resident, presence, self._closing
            )
            for _ in range(workers)
        ]
        self._slots = Slots(
            [worker.run for worker in self._workers],
            self.bill,
            together=lambda work: patience.together(work.size),
            begin=lambda place: self._workers[place].start(),
        )

    @property
    def recoveries(self) -> int:
        """Executions that were lost with their worker."""
        return self.bill.recoveries

    def submit(self, work: Work[ResultOf]) -> "Future[ResultOf]":
        """Queue work for the next free worker.

        Raises:
            ApportionError: after `close`, or no node of the cluster is fit for a worker.
        """
        return self._slots.submit(work)

    def close(self) -> None:
        """Cancel what has not begun, and end the workers. May be called again."""
        if self._closing.is_set():
            return
        self._closing.set()
        self._slots.cancel_waiting()
        self._resident.close()
        for worker in self._workers:
            worker.kill()
        self._slots.join(CLOSE_SECONDS)
        # One may have been started while they were ended.
        for worker in self._workers:
            worker.kill()
