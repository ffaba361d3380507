"""A worker process of a Ray pool: its evaluator, its limits, and its replacement."""

import math
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol

import psutil  # type: ignore[import-untyped]

from apportion.errors import ApportionError
from apportion.units import format_bytes
from apportion.workers.bill import Loss
from apportion.workers.evaluator import Evaluate, Evaluation
from apportion.workers.patience import Patience
from apportion.workers.pool import attempt
from apportion.workers.resident import ResidentWatch
from apportion.workers.slots import CLOSED, Lost
from apportion.workers.spec import WorkerSpec

LIVES = 3
STEP_SECONDS = 0.5


class EvaluatorLike(Protocol):
    """What a worker runs."""

    def evaluate(self, work: Evaluate) -> Evaluation: ...


Build = Callable[[WorkerSpec], EvaluatorLike]


class EvaluatorActor:
    """What runs in a worker process."""

    def __init__(self, spec: WorkerSpec, build: Build) -> None:
        self._spec = spec
        self._build = build

    def pid(self) -> int:
        """The process id."""
        return os.getpid()

    def build(self) -> None:
        """Make the evaluator."""
        self._evaluator = self._build(self._spec)

    def run(self, work: Evaluate) -> Evaluation:
        """Evaluate; an exception becomes a failure."""
        return attempt(self._evaluator.evaluate, work)


class _Died(Exception):
    """The process ended by itself, or by someone else."""


class _Overdue(Exception):
    """There was no answer in time."""


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
            self._process = psutil.Process(self._wait(self._pid, limit_seconds))
            self._resident.add(self._process)
            self._wait(self._built, limit_seconds)
        except (_Died, psutil.Error) as error:
            end = "died" if self._cause_of_death() == "died" else self._memory_told()
            raise ApportionError(f"a worker {end} when it was started") from error
        except _Overdue as error:
            raise ApportionError(
                f"a worker took longer than {limit_seconds:.3g} s to start"
            ) from error
        self._build_patience.learn(1, time.monotonic() - begun)

    def evaluate(self, work: Evaluate) -> Evaluation:
        """Have the process do it.

        Raises:
            Lost: the process died, or was killed because of a limit.
            ApportionError: the pool is closing.
        """
        if not self._is_alive():
            raise Lost("died", "its worker was dead before", self._replace, by_work=False)
        begun, limit = time.monotonic(), self._patience.limit_seconds(work.windows)
        try:
            result: Evaluation = self._wait(self._actor.run.remote(work), limit)
        except _Overdue:
            raise self._timeout(work, limit) from None
        except _Died:
            if self._cause_of_death() == "memory":
                reason = f"its worker {self._memory_told()}"
                raise Lost("memory", reason, self._replace) from None
            raise Lost("died", "its worker died of it", self._replace) from None
        if result.failure is None:
            self._patience.learn(work.windows, time.monotonic() - begun)
        return result

    def kill(self) -> None:
        """End the process, whatever state it is in."""
        process, self._process = self._process, None
        self._ray.kill(self._actor, no_restart=True)
        if process is not None:
            self._resident.remove(process)
            _end(process)

    def _start(self) -> None:
        self._actor = self._actor_class.remote(*self._arguments)
        self._pid, self._built = self._actor.pid.remote(), self._actor.build.remote()

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

    def _timeout(self, work: Evaluate, limit: float) -> Lost:
        usual = self._patience.usual_seconds(work.windows)
        comparison = "" if usual is None else f"; evaluations like it take {usual:.3g} s"
        reason = f"took longer than {limit:.3g} s"
        return Lost("timeout", reason, self._replace, comparison=comparison)

    def _cause_of_death(self) -> Loss:
        process = self._process
        exceeded = process is not None and self._resident.exceeded(process)
        return "memory" if exceeded else "died"

    def _memory_told(self) -> str:
        return f"took more than {format_bytes(self._resident.limit_bytes)} of memory"

    def _wait(self, reference: Any, limit_seconds: float) -> Any:
        """The answer, or what was raised in its place."""
        waited = 0.0
        while not self._closing.is_set():
            begun, step = time.monotonic(), min(STEP_SECONDS, max(0.0, limit_seconds - waited))
            if self._ray.wait([reference], timeout=step)[0]:
                return self._answer(reference)
            # A driver that was stopped itself (Ctrl-Z) has not seen its workers wait.
            waited += min(time.monotonic() - begun, 2 * STEP_SECONDS)
            if waited >= limit_seconds:
                raise _Overdue
        raise ApportionError(CLOSED)

    def _answer(self, reference: Any) -> Any:
        errors = self._ray.exceptions
        try:
            return self._ray.get(reference)
        except errors.RayTaskError as error:
            if isinstance(error.cause, ApportionError):
                raise error.cause from error
            raise ApportionError(f"a worker failed: {error.cause}") from error
        except errors.RayError as error:
            if self._closing.is_set():
                raise ApportionError(CLOSED) from error
            raise _Died from error


def _end(process: psutil.Process) -> None:
    """A stopped or hanging process does not hear Ray, and what it started does not end with it."""
    below = []
    with suppress(psutil.NoSuchProcess):
        below = process.children(recursive=True)
    for each in (process, *below):
        with suppress(psutil.NoSuchProcess):
            each.kill()
