"""Places that work one after another: who gets which work, and what becomes of lost work."""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from apportion.errors import ApportionError
from apportion.workers.bill import Bill, Loss, Outcome
from apportion.workers.evaluator import Evaluate, Evaluation

Worker = Callable[[Evaluate], Evaluation]
LOSSES = 2
CLOSED = "an evaluation was given up: the pool was closed"


class Lost(Exception):
    """A worker was lost with its work.

    Attributes:
        outcome: how.
        reason: the same as a part of a sentence, "took longer than 60 s".
        replace: makes the place fit for work again, or raises ApportionError.
        comparison: what follows the reason, "; evaluations like it take 8 s", or nothing.
        by_work: whether the work may be the cause; not if the worker was dead before.
    """

    def __init__(
        self,
        outcome: Loss,
        reason: str,
        replace: Callable[[], None],
        *,
        comparison: str = "",
        by_work: bool = True,
    ) -> None:
        super().__init__(reason)
        self.outcome: Loss = outcome
        self.reason = reason
        self.replace = replace
        self.comparison = comparison
        self.by_work = by_work


@dataclass
class _Task:
    work: Evaluate
    future: "Future[Evaluation]" = field(default_factory=Future)
    seconds: float = 0.0
    losses: list[Lost] = field(default_factory=list)
    avoided: int | None = None

    def begin(self) -> bool:
        """Whether it is still wanted."""
        return self.future.running() or self.future.set_running_or_notify_cancel()

    def abandon(self) -> None:
        if not self.future.cancel():
            self.future.set_exception(ApportionError(CLOSED))

    def failure(self) -> Evaluation:
        """What is known after the last loss."""
        first, last = self.losses[0], self.losses[-1]
        same = first.reason == last.reason
        told = f"{last.reason} twice" if same else f"{first.reason}, then {last.reason}"
        return Evaluation(None, None, told + last.comparison, self.seconds, last.outcome)


class _Waiting:
    """Tasks in their order. A place does not get back what it lost, unless there is no other."""

    def __init__(self, places: int) -> None:
        self._places = places
        self._tasks: deque[_Task] = deque()
        self._changed = threading.Condition()
        self.closed = False

    def put(self, task: _Task) -> bool:
        """Whether it was taken in. What was begun before comes before what was not."""
        with self._changed:
            if self.closed:
                return False
            if task.future.running():
                self._tasks.appendleft(task)
            else:
                self._tasks.append(task)
            self._changed.notify_all()
            return True

    def take(self, place: int) -> _Task | None:
        """Waits for a task; None when closed."""
        with self._changed:
            while not self.closed:
                for task in self._tasks:
                    if task.avoided != place or self._places == 1:
                        self._tasks.remove(task)
                        return task
                self._changed.wait()
            return None

    def close(self) -> list[_Task]:
        """Gives the tasks that nobody took."""
        with self._changed:
            self.closed = True
            left = list(self._tasks)
            self._tasks.clear()
            self._changed.notify_all()
            return left


class Slots:
    """A thread for each worker that takes from one queue.

    Work that is lost with its worker is done once more, in another place if there is one; lost
    again, it is a failure.
    """

    def __init__(self, workers: Sequence[Worker], bill: Bill) -> None:
        """Takes workers, which may raise `Lost`, and the bill to enter each execution in."""
        self._bill = bill
        self._waiting = _Waiting(len(workers))
        self._begun: dict[int, float] = {}
        self._lock = threading.Lock()
        # Daemons: an evaluation that still runs must not hold up the end of the process.
        self._threads = [
            threading.Thread(target=self._serve, args=(place, worker), daemon=True)
            for place, worker in enumerate(workers)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, work: Evaluate) -> "Future[Evaluation]":
        """Queue work for the next free worker. Raises ApportionError after `cancel_waiting`."""
        task = _Task(work)
        if not self._waiting.put(task):
            raise ApportionError("the pool is closed")
        return task.future

    def cancel_waiting(self) -> None:
        """Cancel what no worker has taken, and let each thread end after what it has."""
        for task in self._waiting.close():
            task.abandon()

    def join(self, seconds: float) -> None:
        """Wait for the threads to end; what still runs then is billed as cancelled."""
        deadline = time.monotonic() + seconds
        for place, thread in enumerate(self._threads):
            thread.join(max(0.0, deadline - time.monotonic()))
            self._settle(place, "cancelled")

    def _serve(self, place: int, worker: Worker) -> None:
        while (task := self._waiting.take(place)) is not None:
            if task.begin():
                self._begun[place] = time.monotonic()
                self._execute(place, worker, task)

    def _execute(self, place: int, worker: Worker, task: _Task) -> None:
        try:
            result = worker(task.work)
        except Lost as lost:
            self._recover(place, task, lost)
        except BaseException as error:  # the future's owner must hear of it, or waits forever
            self._settle(place, "cancelled" if self._waiting.closed else "failed")
            task.future.set_exception(error)
        else:
            self._settle(place, "done" if result.failure is None else "failed")
            task.future.set_result(result)

    def _recover(self, place: int, task: _Task, lost: Lost) -> None:
        """Before the work goes on: so the bill of what is finished is complete."""
        try:
            lost.replace()
        except BaseException as error:
            self._settle(place, lost.outcome)
            task.future.set_exception(error)
            return
        task.seconds += self._settle(place, lost.outcome)
        if lost.by_work:
            task.losses.append(lost)
            task.avoided = place
        if len(task.losses) == LOSSES:
            task.future.set_result(task.failure())
        elif not self._waiting.put(task):
            task.abandon()

    def _settle(self, place: int, outcome: Outcome) -> float:
        """Enter what the place was busy with; nothing where that was done before."""
        with self._lock:
            begun = self._begun.pop(place, None)
        if begun is None:
            return 0.0
        seconds = time.monotonic() - begun
        self._bill.add(outcome, seconds)
        return seconds
