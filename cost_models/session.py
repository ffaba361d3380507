"""One sitting in which a device is timed: what is stored is looked up, the rest is measured."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from apportion.cost_models.fingerprint import conditions
from apportion.cost_models.harness import BLOCK, Call, Clock, Measurement, compare
from apportion.errors import InvalidInput
from apportion.hashing import canonical_json, content_hash

Stored = dict[str, Any]
Record = Callable[[dict[str, Stored]], None]
Progress = Callable[[int, int], None]
"""Told how many measurements are done, and of how many."""

CONDITIONS = "conditions"
ALIVE_BYTES = 2 * 2**30
"""Subjects that are timed together hold about so much; beyond it they take turns."""


@dataclass(frozen=True)
class Timing:
    """How long and how exactly to measure.

    Args:
        operator_seconds: for each operator.
        model_seconds: for each whole configuration and request item.
        half_width: a ratio known to +- this share is known well enough.
        clock: tells seconds.
    """

    operator_seconds: float = 0.25
    model_seconds: float = 0.8
    half_width: float = 0.003
    clock: Clock = time.perf_counter


@dataclass(frozen=True)
class Subject:
    """Something to time: what it is, as JSON, and how to make it callable."""

    description: Mapping[str, Any]
    build: Callable[[], Call]

    @property
    def key(self) -> str:
        """Content hash of the description: the name that the measurement is stored under."""
        return content_hash(dict(self.description))


class Session:
    """Measurements by key, those of earlier sittings included.

    Args:
        known: stored measurements; none of them is taken again.
        record: is handed each batch of new ones, as plain JSON.
        timing: None: nothing may be timed, all must be known (a recorded device).
        seed: of the interleaving.
        progress: is told about each batch.
        total: measurements that are expected in all.
    """

    def __init__(
        self,
        known: Mapping[str, Stored],
        record: Record,
        timing: Timing | None,
        seed: int,
        progress: Progress,
    ) -> None:
        self.known = dict(known)
        self.record = record
        self.timing = timing
        self.seed = seed
        self.progress = progress
        self.total = 0
        self._told: set[str] = set()

    def conditions(self) -> Stored:
        """Under which the first measurement was taken."""
        if CONDITIONS not in self.known and self.timing is not None:
            self._store({CONDITIONS: conditions()})
        return dict(self.known.get(CONDITIONS, {}))

    def measure(
        self,
        subjects: list[Subject],
        reference: Callable[[], Call],
        seconds: float,
        subject_bytes: float,
    ) -> list[Measurement]:
        """Time what is not known, as many subjects at a time as memory allows.

        Args:
            subjects: what to time, all against one reference.
            reference: makes the reference; not called where all is known.
            seconds: for each subject.
            subject_bytes: about what one subject holds in memory.

        Raises:
            InvalidInput: a measurement is missing and nothing may be timed.
        """
        missing = {s.key: s for s in subjects if s.key not in self.known}
        if missing and self.timing is None:
            described = canonical_json(dict(next(iter(missing.values())).description))
            raise InvalidInput(
                f"recorded device: {len(missing)} measurements are missing; the first: "
                f"{described[:160]}"
            )
        names = list(missing)
        against = reference() if names else None
        alive = max(1, min(BLOCK, int(ALIVE_BYTES / max(1.0, subject_bytes))))
        while names and against is not None:
            batch, names = names[:alive], names[alive:]
            self._time({key: missing[key] for key in batch}, against, seconds)
        self._told |= {s.key for s in subjects}
        self.progress(len(self._told), max(self.total, len(self._told)))
        return [Measurement.from_json(self.known[s.key]["measurement"]) for s in subjects]

    @torch.no_grad()
    def _time(self, subjects: Mapping[str, Subject], reference: Call, seconds: float) -> None:
        timing = self.timing
        if timing is None:
            return
        calls = {key: subject.build() for key, subject in subjects.items()}
        found = compare(
            calls,
            reference,
            seconds=seconds,
            half_width=timing.half_width,
            seed=self.seed,
            clock=timing.clock,
        )
        self._store(
            {
                key: {
                    "subject": dict(subjects[key].description),
                    "measurement": measurement.to_json(),
                }
                for key, measurement in found.items()
            }
        )
        self._told |= set(found)
        self.progress(len(self._told), max(self.total, len(self._told)))

    def _store(self, batch: dict[str, Stored]) -> None:
        self.known |= batch
        self.record(batch)


@contextmanager
def threads_set(threads: int) -> Iterator[None]:
    """torch's intra-op threads inside the block; as before after it."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
