"""A pool of Ray actors on this machine, one evaluator each; a lost one is replaced."""

import atexit
import threading
from concurrent.futures import Future
from contextlib import ExitStack

from apportion.errors import ApportionError
from apportion.workers.bill import Bill
from apportion.workers.memory import share_bytes
from apportion.workers.patience import MOST_TOGETHER, Patience
from apportion.workers.ray_session import start_ray, temporary_folder
from apportion.workers.ray_worker import Build, RayWorker
from apportion.workers.resident import ResidentWatch
from apportion.workers.slots import Slots
from apportion.workers.spec import WorkerSpec, build_beside_others
from apportion.workers.watchdog import start_watchdog
from apportion.workers.work import ResultOf, Work

CLOSE_SECONDS = 5.0


class RayPool:
    """Evaluators in processes of their own, under a Ray of their own.

    A worker that dies, takes longer than its like or takes too much memory is killed and replaced.
    Its work is done once more by another; when that one is lost too, the evaluation is a failure.

    Make it in a thread that lives as long as the pool: the kernel ends Ray's processes with the
    thread that started them.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        workers: int,
        *,
        build: Build = build_beside_others,
        patience: Patience | None = None,
        memory_bytes: int | None = None,
        together: int = MOST_TOGETHER,
    ) -> None:
        """Start Ray and the workers, each with its evaluator built.

        Args:
            spec: what a worker is made of.
            workers: how many.
            build: makes what does a worker's work; a function that a worker can import.
            patience: gives the time limit of an evaluation.
            memory_bytes: the most that a worker may take, mapped files apart; by default an equal
                share of the machine's memory.
            together: the most short evaluations that a worker is handed at once.

        Raises:
            ApportionError: Ray is running in this process already, or a worker does not start.
            InvalidInput: the evaluator cannot be built from `spec`.
        """
        self.bill = Bill()
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._processes: list[RayWorker] = []
        self._slots: Slots | None = None
        self._resident = ResidentWatch(memory_bytes or share_bytes(workers))
        self._folder = temporary_folder()
        self._watchdog = start_watchdog(self._folder)
        atexit.register(self.close)
        with ExitStack() as stack:
            stack.callback(self.close)
            patience = patience or Patience()
            self._start_workers(spec, workers, build, patience)
            self._slots = Slots(
                [worker.run for worker in self._processes],
                self.bill,
                together=lambda work: min(together, patience.together(work.size)),
            )
            stack.pop_all()

    @property
    def recoveries(self) -> int:
        """Executions that were lost with their worker."""
        return self.bill.recoveries

    def submit(self, work: Work[ResultOf]) -> "Future[ResultOf]":
        """Queue work for the next free worker. Raises ApportionError after `close`."""
        if self._slots is None:
            raise ApportionError("the pool is closed")
        return self._slots.submit(work)

    def close(self) -> None:
        """Cancel what has not begun, end Ray with all its processes, remove its folder."""
        with self._lock:
            if self._closing.is_set():
                return
            self._closing.set()
        atexit.unregister(self.close)
        if self._slots is not None:
            self._slots.cancel_waiting()
        self._resident.close()
        for worker in self._processes:
            worker.kill()
        if self._slots is not None:
            self._slots.join(CLOSE_SECONDS)
        import ray

        ray.shutdown()
        # Also kills what Ray left, and removes the folder.
        self._watchdog.communicate()

    def _start_workers(
        self, spec: WorkerSpec, workers: int, build: Build, patience: Patience
    ) -> None:
        ray = start_ray(self._folder, workers, spec["threads"])
        for _ in range(workers):
            worker = RayWorker(ray, spec, build, patience, self._resident, self._closing)
            self._processes.append(worker)
        for worker in self._processes:
            worker.wait_until_built()
