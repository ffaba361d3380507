"""Places that work one after another: who gets which work, and what becomes of lost work."""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from apportion.errors import ApportionError
from apportion.workers.bill import Bill, Outcome
from apportion.workers.waiting import Lost, Task, Waiting
from apportion.workers.work import Result, ResultOf, Work

__all__ = ["CLOSED", "Lost", "Slots", "Worker"]

Worker = Callable[[Sequence[Any]], Sequence[Result]]
"""Does what it is handed, in that order, or raises `Lost`."""
LOSSES = 2
CLOSED = "an evaluation was given up: the pool was closed"


def alone(work: Work[Any]) -> int:
    """One at a time."""
    return 1


class Slots:
    """A thread for each worker that takes from one queue.

    Work that is lost with its worker is done once more, in another place if there is one; lost
    again, it is a failure. Of several that are lost together nobody knows which was the cause:
    each is done again alone, as if for the first time.
    """

    def __init__(
        self,
        workers: Sequence[Worker],
        bill: Bill,
        *,
        together: Callable[[Work[Any]], int] = alone,
        begin: Callable[[int], None] | None = None,
    ) -> None:
        """Takes the workers.

        Args:
            workers: do the work; may raise `Lost`.
            bill: each execution is entered there.
            together: how many like this one a worker may be handed at once.
            begin: makes a place, given by its number, fit for work; may take as long as it likes.
                What it raises ends the place, and with the last place all work.
        """
        self._bill = bill
        self._together = together
        self._begin = begin
        self._waiting = Waiting(len(workers), are_here=begin is None)
        self._begun: dict[int, tuple[float, int]] = {}
        self._lock = threading.Lock()
        # Daemons: an evaluation that still runs must not hold up the end of the process.
        self._threads = [
            threading.Thread(target=self._serve, args=(place, worker), daemon=True)
            for place, worker in enumerate(workers)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, work: Work[ResultOf]) -> "Future[ResultOf]":
        """Queue work for the next free worker.

        Raises:
            ApportionError: after `cancel_waiting`, or no place is left.
        """
        task = Task(work)
        if not self._waiting.put(task):
            raise self._waiting.error or ApportionError("the pool is closed")
        return task.future

    def cancel_waiting(self) -> None:
        """Cancel what no worker has taken, and let each thread end after what it has."""
        for task in self._waiting.close():
            _abandon(task)

    def join(self, seconds: float) -> None:
        """Wait for the threads to end; what still runs then is billed as cancelled."""
        deadline = time.monotonic() + seconds
        for place, thread in enumerate(self._threads):
            thread.join(max(0.0, deadline - time.monotonic()))
            self._settle(place, "cancelled")

    def _serve(self, place: int, worker: Worker) -> None:
        if self._begin is not None:
            begin = self._begin
            self._man(place, lambda: begin(place))
        while taken := self._waiting.take(place, self._together):
            tasks = [task for task in taken if task.begin()]
            if tasks:
                self._begun[place] = time.monotonic(), len(tasks)
                self._execute(place, worker, tasks)

    def _man(self, place: int, make: Callable[[], None]) -> None:
        """Wait until a place is fit for work, or leaves for good."""
        try:
            make()
        except BaseException as error:  # in a thread nobody else would hear of it
            for task in self._waiting.leave(place, error):
                _fail(task, error)
        else:
            self._waiting.arrive(place)

    def _execute(self, place: int, worker: Worker, tasks: Sequence[Task]) -> None:
        try:
            results = worker([task.work for task in tasks])
        except Lost as lost:
            self._recover(place, tasks, lost)
        except BaseException as error:  # the future's owner must hear of it, or waits forever
            self._settle(place, "cancelled" if self._waiting.closed else "failed")
            for task in tasks:
                task.future.set_exception(error)
        else:
            outcomes: list[Outcome] = ["done" if r.failure is None else "failed" for r in results]
            self._settle(place, *outcomes)
            for task, result in zip(tasks, results, strict=True):
                task.future.set_result(result)

    def _recover(self, place: int, tasks: Sequence[Task], lost: Lost) -> None:
        if lost.place_may_wait:
            self._waiting.depart(place)
            self._redo(place, tasks, lost, self._settle(place, lost.outcome))
            self._man(place, lost.replace)
            return
        try:
            # Before the work goes on: so the bill of what is finished is complete.
            lost.replace()
        except BaseException as error:  # goes to those who wait for the work
            self._settle(place, lost.outcome)
            for task in tasks:
                task.future.set_exception(error)
            return
        self._redo(place, tasks, lost, self._settle(place, lost.outcome))

    def _redo(self, place: int, tasks: Sequence[Task], lost: Lost, seconds: float) -> None:
        # From the last: each goes before those that wait.
        for task in reversed(tasks):
            task.seconds += seconds
            if lost.by_work and len(tasks) > 1:
                task.is_alone = True
            elif lost.by_work:
                task.losses.append(lost)
                task.avoided = place
            if len(task.losses) == LOSSES:
                task.future.set_result(task.failure())
            elif not self._waiting.put(task):
                _fail(task, self._waiting.error or ApportionError(CLOSED))

    def _settle(self, place: int, *outcomes: Outcome) -> float:
        """Enter what the place was busy with; nothing where that was done before.

        One outcome stands for all that was handed over together, as one execution. Gives the
        seconds of each work.
        """
        with self._lock:
            begun, count = self._begun.pop(place, (0.0, 0))
        if not count:
            return 0.0
        seconds = time.monotonic() - begun
        for outcome in outcomes:
            self._bill.add(outcome, seconds / len(outcomes))
        return seconds / count


def _abandon(task: Task) -> None:
    if not task.future.cancel():
        task.future.set_exception(ApportionError(CLOSED))


def _fail(task: Task, error: BaseException) -> None:
    if task.begin():
        task.future.set_exception(error)
