"""One lock per device and machine: shared by evaluations, exclusive for timing."""

import fcntl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

POLL_SECONDS = 0.2


class DeviceLock:
    """A lock file that all studies of this machine know.

    A process that holds it shared must let go before it asks for it exclusively, or it waits for
    itself. The kernel frees it when its holder dies.
    """

    def __init__(self, folder: Path, device: str) -> None:
        """Takes the folder of locks and the device's fingerprint or name, fit for a file name."""
        self.path = folder / f"{device}.lock"

    @contextmanager
    def shared(self, on_wait: Callable[[], None]) -> Iterator[None]:
        """Evaluate on the device, beside others that evaluate."""
        with self._held(fcntl.LOCK_SH, on_wait):
            yield

    @contextmanager
    def exclusive(self, on_wait: Callable[[], None]) -> Iterator[None]:
        """Time on the device, alone."""
        with self._held(fcntl.LOCK_EX, on_wait):
            yield

    @contextmanager
    def _held(self, kind: int, on_wait: Callable[[], None]) -> Iterator[None]:
        """`on_wait` is called several times a second while another holds the lock; it may raise."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            while not _taken(file.fileno(), kind):
                on_wait()
                time.sleep(POLL_SECONDS)
            yield  # closing the file frees it


def _taken(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
