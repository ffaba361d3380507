"""A place of a pool in a cluster: an evaluator on whatever node has room for it."""

import threading
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import psutil  # type: ignore[import-untyped]

from apportion.errors import ApportionError
from apportion.workers.patience import Patience
from apportion.workers.presence import Presence
from apportion.workers.processes import end_process
from apportion.workers.ray_actor import EvaluatorActor, Whereabouts
from apportion.workers.ray_calls import Calls, Died, Overdue
from apportion.workers.ray_cluster import RayCluster
from apportion.workers.ray_worker import LIVES, Build, learned, memory_told, overdue
from apportion.workers.resident import ResidentWatch
from apportion.workers.slots import Lost
from apportion.workers.spec import WorkerSpec
from apportion.workers.work import Result, Work

# A worker waits so long for a machine's timing to end before it asks again.
LOCK_SECONDS = 5.0
# Ray needs up to twenty seconds until it knows that a node which fell silent is gone.
SILENCE_SECONDS = 60.0
# A node that ends in an orderly way may end its workers before it says so.
FAREWELL_SECONDS = 2.0
PAUSE_SECONDS = 0.25


class ClusterWorker:
    """A process on some node; when it is lost, the next one, there or elsewhere."""

    def __init__(
        self,
        cluster: RayCluster,
        spec: WorkerSpec,
        build: Build,
        index: Any,
        patience: Patience,
        resident: ResidentWatch,
        presence: Presence,
        closing: threading.Event,
    ) -> None:
        """Takes what a worker is made of; `start` starts it.

        Args:
            index: Ray's reference to the bytes of the bank's index, or None.
            resident: watches over the memory of those on this machine. On other nodes Ray itself
                ends a worker when its node's memory runs out.
        """
        self._cluster = cluster
        self._calls = Calls(cluster.ray, closing)
        self._actor_class = cluster.ray.remote(EvaluatorActor)
        self._arguments = (spec, build, index, cluster.here)
        self._patience = patience
        self._build_patience = Patience(enough=1)
        self._resident = resident
        self._presence = presence
        self._closing = closing
        self._actor: Any = None
        self._where: Whereabouts | None = None
        self._process: psutil.Process | None = None

    def start(self) -> None:
        """Wait until a node has room, however long that takes, and for the evaluator there.

        Raises:
            ApportionError: no node of the cluster is fit for it, or the pool is closing.
        """
        deaths: Counter[str] = Counter()
        while True:
            self.kill()
            self._where = None
            try:
                if self._is_built():
                    return
            except (Died, Overdue, psutil.Error):
                self._count(deaths)
                self._closing.wait(PAUSE_SECONDS)
            except ApportionError as error:
                if self._closing.is_set() or self._where is None:
                    raise
                self._cluster.refuse(self._where, error)

    def run(self, works: Sequence[Work[Any]]) -> list[Result]:
        """Have the process do it.

        Raises:
            Lost: the process or its node died, or it was killed because of a limit.
            ApportionError: the pool is closing.
        """
        limit = sum(self._patience.limit_seconds(work.size) for work in works)
        while True:
            # Asked at the same time, answered first: whether it was alive when the work came.
            alive = self._actor.here.remote()
            try:
                results = self._calls.wait(self._actor.run.remote(works), limit + LOCK_SECONDS)
            except Overdue:
                self._presence.went()
                self._end()
                raise overdue(
                    self._patience, works, limit, self.start, place_may_wait=True
                ) from None
            except Died as died:
                self._presence.went()
                raise self._loss(died, alive) from None
            if results is not None:
                seconds = sum(result.seconds for result in results)
                return learned(self._patience, works, results, seconds)

    def kill(self) -> None:
        """End the process, if there is one."""
        actor, self._actor = self._actor, None
        process, self._process = self._process, None
        if actor is not None:
            self._cluster.ray.kill(actor, no_restart=True)
        if process is not None:
            self._resident.remove(process)
            end_process(process.pid)

    def _is_built(self) -> bool:
        """Whether there is an evaluator; not where the node was refused meanwhile."""
        # Not restarted by Ray: its retries would not be counted, nor bounded.
        limits = {"num_cpus": 1, "max_restarts": 0, "max_task_retries": 0}
        self._actor = actor = self._actor_class.options(
            **limits, **self._cluster.options()
        ).remote()
        where = Whereabouts(*self._calls.wait(actor.where.remote(), on_step=self._look))
        self._where = where
        if self._cluster.is_unfit(where.node):
            return False
        self._cluster.require_same(where)
        if where.node == self._cluster.here.node:
            self._process = psutil.Process(where.pid)
            self._resident.add(self._process)
        begun = time.monotonic()
        built = actor.build.remote(*self._arguments)
        self._calls.wait(built, self._build_patience.limit_seconds(1), self._look)
        self._build_patience.learn(1, time.monotonic() - begun)
        self._cluster.accept()
        self._presence.came()
        return True

    def _look(self) -> None:
        """Meanwhile. Raises ApportionError where waiting is in vain."""
        self._presence.look()
        self._cluster.require_fit()

    def _count(self, deaths: "Counter[str]") -> None:
        """A node that lives and where workers do not is not fit."""
        where = self._where
        if where is None or not self._cluster.is_alive(where.node):
            return
        deaths[where.node] += 1
        if deaths[where.node] == LIVES:
            error = ApportionError(f"{LIVES} workers ended there when they were started")
            self._cluster.refuse(where, error)

    def _loss(self, died: Died, alive: Any) -> Lost:
        """What became of the work, and whether it may be to blame."""
        is_dead = died.is_sure or self._is_known_dead()
        if self._where is not None and self._node_is_gone(self._where.node):
            self._cluster.lost(self._where)
            return self._lost("its node was lost", by_work=False)
        if not is_dead:
            return self._lost("its node was out of reach", by_work=False)
        process = self._process
        if process is not None and self._resident.exceeded(process):
            reason = f"its worker {memory_told(self._resident)}"
            return Lost("memory", reason, self.start, place_may_wait=True)
        if died.of_memory:
            reason = "its node ran out of memory"
            return Lost("memory", reason, self.start, place_may_wait=True)
        if not self._calls.has_answer(alive):
            return self._lost("its worker was dead before", by_work=False)
        return self._lost("its worker died of it", by_work=True)

    def _lost(self, reason: str, *, by_work: bool) -> Lost:
        return Lost("died", reason, self.start, by_work=by_work, place_may_wait=True)

    def _is_known_dead(self) -> bool:
        """Ask until Ray knows; not where the process answers after all, or nobody ever knows."""
        deadline = time.monotonic() + SILENCE_SECONDS
        while time.monotonic() < deadline:
            try:
                self._calls.wait(self._actor.here.remote(), SILENCE_SECONDS)
                return False
            except Overdue:
                return False
            except Died as died:
                if died.is_sure:
                    return True
            self._closing.wait(PAUSE_SECONDS)
        return False

    def _node_is_gone(self, node: str) -> bool:
        if node == self._cluster.here.node:
            return False
        deadline = time.monotonic() + FAREWELL_SECONDS
        while self._cluster.is_alive(node):
            if time.monotonic() > deadline or self._closing.wait(PAUSE_SECONDS):
                return False
        return True

    def _end(self) -> None:
        """A process that is stopped does not hear Ray: what ends it must be on its node."""
        where = self._where
        if where is not None and self._process is None and self._cluster.is_alive(where.node):
            options = self._cluster.on_node(where.node)
            self._cluster.ray.remote(end_process).options(**options).remote(where.pid)
        self.kill()
