"""Evaluations of a study: what names one, and how a batch of them is run and kept."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, replace

import numpy as np

from apportion.hashing import content_hash
from apportion.spaces.choice import OPERATION
from apportion.spaces.grammar import names_cache
from apportion.spaces.space import DENSE, DROP, KEEP
from apportion.studies.database.engine import DatabaseAway, at_once
from apportion.studies.database.rows import Evaluation, Lease
from apportion.studies.database.store import Store
from apportion.studies.spool import Spool
from apportion.workers.device_lock import processor_lock
from apportion.workers.evaluator import Evaluation as Done
from apportion.workers.pool import Evaluate, Pool

# Part of every evaluation's name: raise it when the evaluator or an objective gives other numbers
# (tests/workers/test_evaluator.py holds golden losses that notice).
EVALUATOR_VERSION = 1
POLL_SECONDS = 0.2
STOP_SECONDS = 10.0


class Stopped(Exception):
    """The user asked to stop: everything that is finished is stored."""


@dataclass(frozen=True)
class Naming:
    """What an evaluation depends on beside the configuration and the slice.

    Attributes:
        model: revision and dtype.
        data: part -> content hash of its windows in their order.
        objective: name and hash of the user's code, if any.
        numerics: threads, batch, torch version, instruction set.
        bank: site -> option -> name of the realized option.
    """

    model: str
    data: Mapping[str, str]
    objective: str
    numerics: str
    bank: Mapping[str, Mapping[str, str]]

    def key(self, configuration: Mapping[str, str], part: str, first: int, windows: int) -> str:
        """The content-addressed name of one evaluation."""
        chosen = {
            site: text if _is_plain(text) else self.bank[site][text]
            for site, text in configuration.items()
            if text not in (DENSE, KEEP)
        }
        surroundings = [EVALUATOR_VERSION, self.model, self.objective, self.numerics]
        return content_hash([*surroundings, self.data[part], first, windows, chosen])


def _is_plain(text: str) -> bool:
    """Whether an option says all by itself: the bank holds nothing of it."""
    return text == DROP or text.startswith(OPERATION) or names_cache(text)


@dataclass(frozen=True)
class Runner:
    """Runs evaluations that the store does not hold, and stores each as it ends.

    While the database is away, results go to the spool, and nothing new is started.
    """

    store: Store
    lease: Lease
    pool: Pool
    spool: Spool
    stopped: Callable[[], bool]

    def run(self, work: Sequence[tuple[str, Evaluate]]) -> Iterator[tuple[str, Evaluation]]:
        """Yield (key, evaluation) as they end, stored ones first; each key once.

        Raises:
            Stopped: asked to stop, and nothing new was started since.
            LeaseLost: another process runs the study.
        """
        wanted = dict(work)
        known = self.store.evaluations(list(wanted), self.lease.study_id)
        yield from ((key, rounded(evaluation)) for key, evaluation in known.items())
        if len(known) < len(wanted):
            # Nobody times on this machine's processor meanwhile.
            with processor_lock().shared(self._wait_for_timing):
                yield from self._run_new([(k, t) for k, t in wanted.items() if k not in known])
            self.drain()

    def stored(self, keys: Sequence[str]) -> int:
        """How many of the evaluations are there already."""
        return len(self.store.evaluations(set(keys), self.lease.study_id))

    def drain(self) -> None:
        """Hand the spooled results to the database, waiting for it."""
        for key, evaluation in self.spool:
            self.store.record_evaluation(self.lease, key, evaluation)
            self.spool.remove(key)

    def _wait_for_timing(self) -> None:
        if self.stopped():
            raise Stopped

    def _run_new(self, work: Sequence[tuple[str, Evaluate]]) -> Iterator[tuple[str, Evaluation]]:
        running = {self.pool.submit(task): key for key, task in work}
        try:
            while running:
                done, _ = wait(running, timeout=POLL_SECONDS, return_when=FIRST_COMPLETED)
                kept = self._keep({running.pop(future): future for future in done})
                yield from kept.items()
                if self.stopped() and running:
                    self._finish_started(running)
        finally:
            for future in running:
                future.cancel()

    def _keep(self, done: Mapping[str, "Future[Done]"]) -> dict[str, Evaluation]:
        """Store what has ended by now, in one transaction: each waits for the disk."""
        ended = {key: future.result() for key, future in done.items() if not future.exception()}
        results = {key: rounded(_result(result)) for key, result in ended.items()}
        try:
            if results:
                self.store.record_evaluations(self.lease, results, at_once)
        except DatabaseAway:
            for key, evaluation in results.items():
                self.spool.put(key, evaluation)
        for future in done.values():
            future.result()
        return results

    def _finish_started(self, running: Mapping["Future[Done]", str]) -> None:
        """Cancel what has not begun, wait a little for what has, keep it."""
        left = [future for future in running if not future.cancel()]
        done, _ = wait(left, timeout=STOP_SECONDS)
        self._keep({running[future]: future for future in done})
        raise Stopped


def _result(done: Done) -> Evaluation:
    return Evaluation(done.losses, done.weights, done.failure, done.seconds, done.error_class)


def rounded(evaluation: Evaluation) -> Evaluation:
    """Its losses as float32 holds them, 4 bytes each: fresh ones and stored ones alike.

    The relative error, 6e-8, is far below the standard error of any mean.
    """
    losses = evaluation.losses
    if losses is None:
        return evaluation
    return replace(evaluation, losses=losses.astype(np.float32).astype(np.float64))
