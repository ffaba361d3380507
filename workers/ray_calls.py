"""Waiting for what Ray's processes answer, and telling apart why they do not."""

import math
import threading
import time
from collections.abc import Callable
from typing import Any

from apportion.errors import ApportionError
from apportion.workers.slots import CLOSED

STEP_SECONDS = 0.5


class Died(Exception):
    """The process ended by itself, or by someone else.

    Attributes:
        is_sure: whether Ray knows that it did, and not only that it does not answer.
        of_memory: whether Ray ended it because its node ran out of memory.
    """

    def __init__(self, is_sure: bool, of_memory: bool) -> None:
        super().__init__()
        self.is_sure = is_sure
        self.of_memory = of_memory


class Overdue(Exception):
    """There was no answer in time."""


class Calls:
    """Waits for answers until the pool closes."""

    def __init__(self, ray: Any, closing: threading.Event) -> None:
        self.ray = ray
        self.closing = closing

    def wait(
        self,
        reference: Any,
        limit_seconds: float = math.inf,
        on_step: Callable[[], None] = lambda: None,
    ) -> Any:
        """The answer.

        Args:
            reference: Ray's future.
            limit_seconds: how long to wait.
            on_step: called twice a second meanwhile.

        Raises:
            Died: the process is gone.
            Overdue: the time is over.
            ApportionError: what the process raised, or the pool is closing.
        """
        waited = 0.0
        while not self.closing.is_set():
            begun, step = time.monotonic(), min(STEP_SECONDS, max(0.0, limit_seconds - waited))
            if self.ray.wait([reference], timeout=step)[0]:
                return self.answer(reference)
            on_step()
            # A driver that was stopped itself (Ctrl-Z) has not seen its workers wait.
            waited += min(time.monotonic() - begun, 2 * STEP_SECONDS)
            if waited >= limit_seconds:
                raise Overdue
        raise ApportionError(CLOSED)

    def answer(self, reference: Any) -> Any:
        """The answer that is there. Raises like `wait`."""
        errors = self.ray.exceptions
        try:
            return self.ray.get(reference)
        except errors.RayTaskError as error:
            if isinstance(error.cause, ApportionError):
                raise error.cause from error
            raise ApportionError(f"a worker failed: {error.cause}") from error
        except errors.RuntimeEnvSetupError as error:
            told = " ".join(str(error).split())
            raise ApportionError(f"Ray cannot start a worker: {told}") from error
        except errors.RayError as error:
            if self.closing.is_set():
                raise ApportionError(CLOSED) from error
            is_sure = not isinstance(error, errors.ActorUnavailableError)
            raise Died(is_sure, isinstance(error, errors.OutOfMemoryError)) from error

    def has_answer(self, reference: Any) -> bool:
        """Whether the process has answered, and is not known to have died before."""
        if not self.ray.wait([reference], timeout=0)[0]:
            return False
        try:
            self.ray.get(reference)
        except self.ray.exceptions.RayError:
            return False
        return True
