"""Holding a study: the lease is renewed, and who asks its driver to stop is heard."""

import _thread
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from threading import Event

from apportion.errors import ApportionError
from apportion.studies.cli.display import Display
from apportion.studies.database.engine import DatabaseAway
from apportion.studies.database.rows import Lease, LeaseLost
from apportion.studies.database.store import Store

LEASE_SECONDS = 30.0
HEAR_SECONDS = 1.0
APART_SECONDS = 15.0
"""Longer than from one try to reach a lost database to the next."""
NOW = "now"


@contextmanager
def leased(
    store: Store, study_id: int, stop: Event, display: Display, take_over: bool = False
) -> Iterator[Lease]:
    """Hold a study while the block runs, renewing the lease from a thread.

    Args:
        stop: set when somebody asks the study to stop. Asked to stop now, the main thread gets
            what Ctrl-C gives it.
        take_over: even from a process that holds it.

    Raises:
        InvalidInput: another process runs the study; names it.
    """
    lease = store.acquire(study_id, LEASE_SECONDS, take_over)
    ended = Event()
    keeper = threading.Thread(
        target=_keep, args=(store, lease, ended, stop, display.warning), daemon=True
    )
    keeper.start()
    try:
        yield lease
    finally:
        ended.set()
        keeper.join()
        with suppress(DatabaseAway):  # the lease expires by itself
            store.release(lease)


def waiting(stop: Event, display: Display) -> Callable[[ApportionError, float], bool]:
    """Wait for a lost database as long as the study is wanted, and say so once for each time."""
    seen, told = 0.0, False

    def goes_on(error: ApportionError, seconds: float) -> bool:
        nonlocal seen, told  # of all threads that meet the same outage
        now = time.monotonic()
        told = told and now - seen < APART_SECONDS
        seen = now
        if seconds > 0.0 and not told:
            told = True
            display.warning(f"{error}; the study waits, results are kept")
        return not stop.is_set()

    return goes_on


def _keep(
    store: Store, lease: Lease, ended: Event, stop: Event, told: Callable[[str], None]
) -> None:
    renewed = 0
    while not ended.wait(HEAR_SECONDS):
        renewed += 1
        due = renewed * HEAR_SECONDS >= LEASE_SECONDS / 3
        try:
            asked = store.renew(lease) if due else store.stop_asked(lease.study_id)
        except LeaseLost:
            stop.set()  # the driver's next write says why
            return
        except ApportionError:  # away, or its disk is full: the driver's own writes tell of it
            continue
        renewed = 0 if due else renewed
        if asked and not stop.is_set():
            stop.set()
            told("asked to stop: what runs comes to its end" if asked != NOW else "asked to stop")
        if asked == NOW:
            _thread.interrupt_main()
            return
