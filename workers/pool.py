"""Pools: submit work, get a future. One thread of this process stands behind each worker."""

import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Protocol

from apportion.workers.evaluator import Evaluate, Evaluation

__all__ = ["Evaluate", "Evaluation", "InProcessPool", "Pool", "Workers", "attempt"]

Worker = Callable[[Evaluate], Evaluation]
ATTEMPTS = 2
CLOSE_SECONDS = 2.0


class Pool(Protocol):
    """Where evaluations are done.

    `submit` never blocks. The future holds an `Evaluation` (with a failure where the work raised
    twice), or an ApportionError where no worker can be kept alive.

    Attributes:
        recoveries: evaluations redone because their worker died.
    """

    recoveries: int

    def submit(self, work: Evaluate) -> "Future[Evaluation]": ...

    def close(self) -> None:
        """Cancel what has not begun, and end the workers. May be called again."""


class Workers:
    """One queue, and a thread for each worker that takes from it."""

    def __init__(self, workers: Sequence[Worker]) -> None:
        self._queue: queue.SimpleQueue[tuple[Evaluate, Future[Evaluation]] | None]
        self._queue = queue.SimpleQueue()
        # Daemons: an evaluation that still runs must not hold up the end of the process.
        self._threads = [
            threading.Thread(target=self._serve, args=(worker,), daemon=True) for worker in workers
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, work: Evaluate) -> "Future[Evaluation]":
        """Queue work for the next free worker."""
        future: Future[Evaluation] = Future()
        self._queue.put((work, future))
        return future

    def cancel_waiting(self) -> None:
        """Cancel what no worker has taken, and let each thread end after what it has."""
        while not self._queue.empty():
            try:
                item = self._queue.get_nowait()
            except queue.Empty:
                break
            if item is not None:
                item[1].cancel()
        for _ in self._threads:
            self._queue.put(None)

    def join(self, seconds: float) -> bool:
        """Wait for the threads to end; whether all did."""
        deadline = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _serve(self, worker: Worker) -> None:
        while (item := self._queue.get()) is not None:
            work, future = item
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(worker(work))
            except BaseException as error:  # the future's owner must hear of it, or waits forever
                future.set_exception(error)


class InProcessPool:
    """One evaluator, in this process."""

    def __init__(self, evaluate: Worker) -> None:
        """Takes an evaluator's `evaluate`."""
        self.recoveries = 0
        self._workers = Workers([lambda work: attempt(evaluate, work)])

    def submit(self, work: Evaluate) -> "Future[Evaluation]":
        return self._workers.submit(work)

    def close(self) -> None:
        self._workers.cancel_waiting()
        self._workers.join(CLOSE_SECONDS)


def attempt(evaluate: Worker, work: Evaluate) -> Evaluation:
    """Evaluate; once more if it raises; then a failure that says what it raised."""
    started = time.perf_counter()
    reason = ""
    for _ in range(ATTEMPTS):
        try:
            return evaluate(work)
        except Exception as error:  # models and losses are the user's: they raise anything
            reason = " ".join(f"{type(error).__name__}: {error}".split())
    return Evaluation(None, None, reason, time.perf_counter() - started)
