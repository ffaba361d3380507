"""Pools: submit work, get a future. One thread of this process stands behind each worker."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, Protocol

from apportion.spaces.bank import NotFetched
from apportion.workers.bill import Bill
from apportion.workers.evaluator import Evaluate, Evaluation
from apportion.workers.patience import Patience
from apportion.workers.slots import Slots
from apportion.workers.work import Result, ResultOf, Work

__all__ = ["Evaluate", "Evaluation", "InProcessPool", "Overdue", "Pool", "attempt"]

Overdue = Callable[[Any, float, float], None]
Do = Callable[[Any], Result]
"""Does one work, of the kind that it is there for."""
ATTEMPTS = 2
CLOSE_SECONDS = 2.0


class Pool(Protocol):
    """Where work is done: evaluations, or the entries of a bank.

    `submit` never blocks. The future holds a result (with a failure where the work raised
    twice, or was lost with its worker twice), or an ApportionError where no worker can be kept
    alive.

    Attributes:
        bill: seconds of the workers by outcome.
    """

    bill: Bill

    @property
    def recoveries(self) -> int:
        """Executions that were lost with their worker."""

    def submit(self, work: Work[ResultOf]) -> "Future[ResultOf]": ...

    def close(self) -> None:
        """Cancel what has not begun, and end the workers. May be called again."""


class InProcessPool:
    """One worker, in this process. It cannot end what hangs; it can tell of it."""

    def __init__(
        self,
        do: Do,
        *,
        patience: Patience | None = None,
        on_overdue: Overdue | None = None,
    ) -> None:
        """Takes what does the work, as an evaluator's `evaluate`.

        Args:
            do: does the work.
            patience: gives the time limit of a work.
            on_overdue: is told once, in a thread of its own, of a work beyond its limit: the work,
                its seconds until now, and the limit in seconds.
        """
        self.bill = Bill()
        self._do = do
        self._patience = patience or Patience()
        self._on_overdue = on_overdue
        self._timer: threading.Timer | None = None
        self._slots = Slots([self._run], self.bill)

    @property
    def recoveries(self) -> int:
        """None: nothing is lost here that this process survives."""
        return self.bill.recoveries

    def submit(self, work: Work[ResultOf]) -> "Future[ResultOf]":
        """Queue work. Raises ApportionError after `close`."""
        return self._slots.submit(work)

    def close(self) -> None:
        """Cancel what has not begun, and wait a little for what has."""
        self._slots.cancel_waiting()
        self._slots.join(CLOSE_SECONDS)
        if (timer := self._timer) is not None:
            timer.cancel()
            timer.join()

    def _run(self, works: Sequence[Work[Any]]) -> list[Result]:
        return [self._run_one(work) for work in works]

    def _run_one(self, work: Work[Result]) -> Result:
        begun = time.monotonic()
        with self._told_if_overdue(work, begun):
            result = attempt(self._do, work)
        if result.failure is None:
            self._patience.learn(work.size, time.monotonic() - begun)
        return result

    @contextmanager
    def _told_if_overdue(self, work: Work[Any], begun: float) -> Iterator[None]:
        if (tell := self._on_overdue) is None:
            yield
            return
        limit = self._patience.limit_seconds(work.size)
        timer = threading.Timer(limit, lambda: tell(work, time.monotonic() - begun, limit))
        timer.daemon = True
        self._timer = timer
        timer.start()
        try:
            yield
        finally:
            timer.cancel()


def attempt(do: Callable[[Any], ResultOf], work: Work[ResultOf]) -> ResultOf:
    """Do it; once more if it raises; then a failure that says what it raised.

    Raises:
        NotFetched: the bank's entries do not come here.
    """
    started = time.perf_counter()
    reason = ""
    for _ in range(ATTEMPTS):
        try:
            return do(work)
        except NotFetched:
            raise  # no configuration may be blamed for it
        except Exception as error:  # models and losses are the user's: they raise anything
            reason = " ".join(f"{type(error).__name__}: {error}".split())
    return work.failed(reason, time.perf_counter() - started, "raised")
