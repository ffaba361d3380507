"""One lock per device and machine: shared by evaluations, exclusive for timing."""

import fcntl
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

POLL_SECONDS = 0.2
LOCKS = Path(tempfile.gettempdir()) / f"apportion-locks-{os.getuid()}"
"""Known to all studies of this machine and user, whatever their home."""


def processor_lock() -> "DeviceLock":
    """The lock of this machine's processor."""
    return DeviceLock(LOCKS, "cpu")


class DeviceLock:
    """A lock file that all studies of this machine know.

    A process that holds it shared must let go before it asks for it exclusively, or it waits for
    itself. The kernel frees it when its holder dies. Who wants to time holds the gate while it
    waits, so that those who evaluate, one batch after another, cannot keep it waiting for ever.
    """

    def __init__(self, folder: Path, device: str) -> None:
        """Takes the folder of locks and the device's fingerprint or name, fit for a file name."""
        self.path = folder / f"{device}.lock"
        self.gate = folder / f"{device}.gate"

    @contextmanager
    def shared(self, on_wait: Callable[[], None]) -> Iterator[None]:
        """Evaluate on the device, beside others that evaluate."""
        with ExitStack() as stack:
            with _held(self.gate, fcntl.LOCK_EX, on_wait):
                stack.enter_context(_held(self.path, fcntl.LOCK_SH, on_wait))
            yield

    @contextmanager
    def exclusive(self, on_wait: Callable[[], None]) -> Iterator[None]:
        """Time on the device, alone."""
        with (
            _held(self.gate, fcntl.LOCK_EX, on_wait),
            _held(self.path, fcntl.LOCK_EX, on_wait),
        ):
            yield


@contextmanager
def _held(path: Path, kind: int, on_wait: Callable[[], None]) -> Iterator[None]:
    """`on_wait` is called several times a second while another holds the lock; it may raise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
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
