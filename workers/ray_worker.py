"""A worker process of this machine's own Ray: its evaluator, its limits, and its replacement."""

import math
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import psutil  # type: ignore[import-untyped]

from apportion.errors import ApportionError
from apportion.units import format_bytes
from apportion.workers.bill import Loss
from apportion.workers.patience import Patience
from apportion.workers.pool import Do
from apportion.workers.processes import end_process
from apportion.workers.ray_actor import EvaluatorActor
from apportion.workers.ray_calls import Calls, Died, Overdue
from apportion.workers.resident import ResidentWatch
from apportion.workers.slots import CLOSED, Lost
from apportion.workers.spec import WorkerSpec
from apportion.workers.work import Result, Work

LIVES = 3


Build = Callable[[WorkerSpec], Do]
"""Makes what does a worker's work; a function that a worker can import."""


class RayWorker:
    """One place of the pool: a process with an evaluator, and after its death the next one."""

    def __init__(
        self,
        ray: Any,
        spec: WorkerSpec,
        build: Build,
        patience: Patience,
        resident: ResidentWatch,
        closing: threading.Event,
    ) -> None:
        """Start a process; `wait_until_built` waits for its evaluator."""
        self._ray = ray
        self._calls = Calls(ray, closing)
        # Not restarted by Ray: its retries would not be counted, nor bounded.
        self._actor_class = ray.remote(EvaluatorActor).options(
            num_cpus=1, max_restarts=0, max_task_retries=0
        )
        self._arguments = (spec, build)
        self._patience = patience
        # One is enough: a build does the same every time.
        self._build_patience = Patience(enough=1)
        self._resident = resident
        self._closing = closing
        self._process: psutil.Process | None = None
        self._start()

    def wait_until_built(self, limit_seconds: float = math.inf) -> None:
        """Wait for the evaluator.

        Raises:
            InvalidInput: it cannot be built from the specification.
            ApportionError: the process does not start, or the pool is closing.
        """
        begun = time.monotonic()
        try:
            self._process = psutil.Process(self._calls.wait(self._where, limit_seconds).pid)
            self._resident.add(self._process)
            self._calls.wait(self._built, limit_seconds)
        except (Died, psutil.Error) as error:
            end = "died" if self._cause_of_death() == "died" else memory_told(self._resident)
            raise ApportionError(f"a worker {end} when it was started") from error
        except Overdue as error:
            raise ApportionError(
                f"a worker took longer than {limit_seconds:.3g} s to start"
            ) from error
        self._build_patience.learn(1, time.monotonic() - begun)

    def run(self, works: Sequence[Work[Any]]) -> list[Result]:
        """Have the process do it.

        Raises:
            Lost: the process died, or was killed because of a limit.
            ApportionError: the pool is closing.
        """
        if not self._is_alive():
            raise Lost("died", "its worker was dead before", self._replace, by_work=False)
        limit = sum(self._patience.limit_seconds(work.size) for work in works)
        begun = time.monotonic()
        try:
            results = self._calls.wait(self._actor.run.remote(works), limit)
        except Overdue:
            raise overdue(self._patience, works, limit, self._replace) from None
        except Died:
            if self._cause_of_death() == "memory":
                reason = f"its worker {memory_told(self._resident)}"
                raise Lost("memory", reason, self._replace) from None
            raise Lost("died", "its worker died of it", self._replace) from None
        return learned(self._patience, works, results, time.monotonic() - begun)

    def kill(self) -> None:
        """End the process, whatever state it is in."""
        process, self._process = self._process, None
        self._ray.kill(self._actor, no_restart=True)
        if process is not None:
            self._resident.remove(process)
            end_process(process.pid)

    def _start(self) -> None:
        self._actor = self._actor_class.remote()
        self._where = self._actor.where.remote()
        self._built = self._actor.build.remote(*self._arguments)

    def _replace(self) -> None:
        """Raises ApportionError where no new process lives to have its evaluator built."""
        for attempts_left in reversed(range(LIVES)):
            if self._closing.is_set():
                raise ApportionError(CLOSED)
            self.kill()
            self._start()
            try:
                self.wait_until_built(self._build_patience.limit_seconds(1))
                return
            except ApportionError:
                if not attempts_left:
                    self.kill()
                    raise

    def _is_alive(self) -> bool:
        try:
            process = self._process
            return process is not None and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    def _cause_of_death(self) -> Loss:
        process = self._process
        exceeded = process is not None and self._resident.exceeded(process)
        return "memory" if exceeded else "died"


def overdue(
    patience: Patience,
    works: Sequence[Work[Any]],
    limit_seconds: float,
    replace: Callable[[], None],
    *,
    place_may_wait: bool = False,
) -> Lost:
    """The loss of work that took too long."""
    usual = patience.usual_seconds(sum(work.size for work in works))
    comparison = "" if usual is None else f"; evaluations like it take {usual:.3g} s"
    reason = f"took longer than {limit_seconds:.3g} s"
    return Lost("timeout", reason, replace, comparison=comparison, place_may_wait=place_may_wait)


def learned(
    patience: Patience, works: Sequence[Work[Any]], results: Sequence[Result], seconds: float
) -> list[Result]:
    """The results, after patience was told of the `seconds` that they took together."""
    for work, result in zip(works, results, strict=True):
        if result.failure is None:
            patience.learn(work.size, seconds / len(works))
    return list(results)


def memory_told(resident: ResidentWatch) -> str:
    """That a worker took too much memory, as a part of a sentence."""
    return f"took more than {format_bytes(resident.limit_bytes)} of memory"
