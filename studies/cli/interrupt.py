"""Ctrl-C: the first lets what runs come to its end, the second does not."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

GRACE_S = 10.0
JOIN_S = 1.0


@contextmanager
def interruptible(
    notice: Callable[[str], None], grace_s: float = GRACE_S
) -> Iterator[threading.Event]:
    """Turn the first Ctrl-C into an event; raise KeyboardInterrupt `grace_s` seconds later.

    The second Ctrl-C raises it at once, the third ends the process. Only in the main thread.

    Args:
        notice: is told what the first Ctrl-C does.
    """
    stop = threading.Event()
    told: list[threading.Thread] = []

    def first(signum: int, frame: FrameType | None) -> None:
        if stop.is_set():  # it was asked from outside to stop: this is the second time
            at_once(signum, frame)
        stop.set()
        signal.signal(signal.SIGINT, at_once)
        signal.setitimer(signal.ITIMER_REAL, grace_s)
        text = f"stopping: what runs has {grace_s:.0f} s to end; Ctrl-C again stops at once"
        # A handler may come in the middle of a write to the same stream, which would raise here.
        told.append(threading.Thread(target=notice, args=(text,), daemon=True))
        told[-1].start()

    def at_once(signum: int, frame: FrameType | None) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        raise KeyboardInterrupt

    before = {
        signal.SIGINT: signal.signal(signal.SIGINT, first),
        signal.SIGALRM: signal.signal(signal.SIGALRM, at_once),
    }
    try:
        yield stop
    finally:
        for thread in told:
            thread.join(JOIN_S)
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)
