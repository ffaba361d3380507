"""The workers of the stage compress: they calibrate, and fill the bank with what it lacks."""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from functools import cached_property
from typing import Any, TypeVar

from apportion.errors import ApportionError
from apportion.spaces.bank import Bank, NotFetched
from apportion.studies.context import Context, worker_spec
from apportion.studies.evaluations import POLL_SECONDS, Stopped
from apportion.studies.pools import open_pool
from apportion.workers.bank_fetching import WORKER, fetcher
from apportion.workers.calibrator import Collected, build_compressor
from apportion.workers.patience import Patience
from apportion.workers.pool import InProcessPool, Pool
from apportion.workers.realizer import Realization, Realize, Realizer
from apportion.workers.work import Result, Work

Kind = TypeVar("Kind", bound=Work[Result])


class Compressors:
    """Workers of the whole stage, started when there is something for them to do."""

    def __init__(self, context: Context) -> None:
        self.context = context

    def close(self) -> None:
        """End them."""
        if "_pool" in vars(self):
            self._pool.close()

    def do(
        self,
        works: Sequence[Kind],
        take: Callable[[Kind, Any], None],
        begun: Callable[[Sequence[Kind]], None] = lambda works: None,
    ) -> None:
        """Have work done, and what comes of it taken as it comes.

        Args:
            works: the first ones are begun first.
            take: takes a result. Where it raises NotFetched, the work is done once more.
            begun: is told now and then what is being done.

        Raises:
            ApportionError: workers that cannot be kept alive.
            Stopped: the user asked to stop.
        """
        again: list[Kind] = []
        running = {self._pool.submit(work): work for work in works}
        try:
            while running:
                done, _ = wait(running, timeout=POLL_SECONDS, return_when=FIRST_COMPLETED)
                if self.context.stop.is_set():
                    raise Stopped
                for future in done:
                    work = running.pop(future)
                    try:
                        take(work, future.result())
                    except NotFetched:  # its node is gone, and what it made
                        if any(work is lost for lost in again):
                            raise
                        again.append(work)
                        running[self._pool.submit(work)] = work
                begun([work for future, work in running.items() if future.running()])
        finally:
            for future in running:
                future.cancel()

    @cached_property
    def _pool(self) -> Pool:
        context = self.context
        spec = worker_spec(context.spec, context.home)

        def in_process() -> InProcessPool:
            return InProcessPool(Realizer(context.setting, spec, context.stop.is_set).realize)

        # One entry takes a thousand times as long as another, and none hangs: there is no limit.
        patience = Patience(floor_seconds=math.inf)
        return open_pool(context, spec, build_compressor, in_process, patience)


def fill(
    compressors: Compressors, works: Sequence[Realize], progress: Callable[[int, str], None]
) -> None:
    """Have entries made; no worker is started where there are none to make.

    Args:
        compressors: make them.
        works: the entries that the bank lacks, of one site each; the first ones are begun first.
        progress: is told how many of them are there, and a site.

    Raises:
        InvalidInput: weights or calibration data that cannot be compressed.
        ApportionError: workers that cannot be kept alive, or entries that nobody could make.
        OSError: the disk is full or the bank cannot be written.
        Stopped: the user asked to stop; whole entries stay.
    """
    bank, made = compressors.context.bank, 0

    def take(work: Realize, result: Realization) -> None:
        nonlocal made
        checked(result)
        source = bank
        if result.origin is not None:
            source = Bank(bank.folder, fetcher(result.origin, WORKER))
        for key in work.keys.values():
            source.ensure(key)
        made += len(work.keys)
        progress(made, work.site)

    def begun(works: Sequence[Realize]) -> None:
        if works:
            there = sum(bank.has(key) for work in works for key in work.keys.values())
            progress(made + there, works[0].site)

    compressors.do(works, take, begun)


def checked(result: Realization | Collected) -> None:
    """Raises what `fill` does where nothing came of work."""
    if result.error is not None:
        raise result.error
    if result.failure is not None:
        raise ApportionError(result.failure)
