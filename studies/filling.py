"""The bank filled by the workers of a study: what it lacks is made, whole entries only."""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from contextlib import closing

from apportion.errors import ApportionError
from apportion.spaces.bank import Bank, NotFetched
from apportion.studies.context import Context, worker_spec
from apportion.studies.evaluations import POLL_SECONDS, Stopped
from apportion.studies.pools import open_pool
from apportion.workers.bank_fetching import fetcher
from apportion.workers.patience import Patience
from apportion.workers.pool import InProcessPool, Pool
from apportion.workers.realizer import Realization, Realize, Realizer, build_realizer


def fill(context: Context, works: Sequence[Realize], progress: Callable[[int, str], None]) -> None:
    """Have entries made; no worker is started where there are none to make.

    Args:
        works: the entries that the bank lacks, of one site each; the first ones are begun first.
        progress: is told how many of them are there, and a site.

    Raises:
        InvalidInput: weights or calibration data that cannot be compressed.
        ApportionError: workers that cannot be kept alive, or entries that nobody could make.
        OSError: the disk is full or the bank cannot be written.
        Stopped: the user asked to stop; whole entries stay.
    """
    if works:
        with closing(_pool(context)) as pool:
            _run(context, pool, works, progress)


def _pool(context: Context) -> Pool:
    spec = worker_spec(context.spec, context.home)

    def in_process() -> InProcessPool:
        return InProcessPool(Realizer(context.setting, spec, context.stop.is_set).realize)

    # One entry takes a thousand times as long as another, and none hangs: there is no limit.
    patience = Patience(floor_seconds=math.inf)
    return open_pool(context, spec, build_realizer, in_process, patience)


def _run(
    context: Context, pool: Pool, works: Sequence[Realize], progress: Callable[[int, str], None]
) -> None:
    bank, made, again = context.bank, 0, set[str]()
    running = {pool.submit(work): work for work in works}
    while running:
        done, _ = wait(running, timeout=POLL_SECONDS, return_when=FIRST_COMPLETED)
        if context.stop.is_set():
            raise Stopped
        for future in done:
            work = running.pop(future)
            try:
                _take(bank, work, future.result())
            except NotFetched:  # its node is gone, and what it made
                if work.site in again:
                    raise
                again.add(work.site)
                running[pool.submit(work)] = work
                continue
            made += len(work.keys)
            progress(made, work.site)
        begun = [work for future, work in running.items() if future.running()]
        if begun:
            there = sum(bank.has(key) for work in begun for key in work.keys.values())
            progress(made + there, begun[0].site)


def _take(bank: Bank, work: Realize, result: Realization) -> None:
    """Have the entries here, in the driver's bank. Raises NotFetched and what `fill` does."""
    if result.error is not None:
        raise result.error
    if result.failure is not None:
        raise ApportionError(result.failure)
    if result.origin is not None:
        bank = Bank(bank.folder, fetcher(result.origin, "a worker's node"))
    for key in work.keys.values():
        bank.ensure(key)
