"""What goes into the store and comes out of it."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from apportion.errors import ApportionError, InvalidInput
from apportion.studies.database.owners import Owner

NAME = re.compile(r"[a-z0-9._-]{1,64}")


class LeaseLost(ApportionError):
    """Another process runs the study by now, or none: what was to be written was not."""


def check_name(name: str) -> None:
    """Refuses what cannot name a study. Raises InvalidInput."""
    if NAME.fullmatch(name) is None:
        raise InvalidInput(
            f'"{name}" cannot name a study: 1 to 64 of the characters a-z, 0-9, ".", "_", "-"'
        )


@dataclass(frozen=True)
class Lease:
    """The right to write to one study: good until another is given out for it.

    `epoch` counts the leases of the study; `seconds` is how long it stands without `renew`.
    """

    study_id: int
    epoch: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class StudyRow:
    """A study as stored; `created_at` in seconds since 1970.

    `lease_left` is in seconds, by the database's clock, when the row was read; negative: expired.
    """

    id: int
    name: str
    specification: dict[str, Any]
    specification_hash: str
    created_at: float
    state: str  # "running", "stopped", "done", "failed"
    stage: str
    message: str
    owner: Owner | None
    epoch: int
    lease_left: float

    @property
    def is_owned(self) -> bool:
        """Whether a process runs it: a "running" study without owner was interrupted."""
        return self.owner is not None and self.lease_left > 0 and not self.owner.is_dead()


@dataclass(frozen=True, kw_only=True)
class NewTrial:
    """A solver's proposal before the store has numbered it."""

    configuration: Mapping[str, str]  # site -> option
    first_window: int
    windows: int
    part: str  # "search", "heldout"
    origin: str
    costs: Mapping[str, float]  # kind -> value
    evaluation_key: str
    vector: Sequence[float] | None = None


@dataclass(frozen=True, kw_only=True)
class TrialRow(NewTrial):
    """A stored trial: `number` counts from 0 within the study, over all its rounds."""

    number: int
    round: int


@dataclass(frozen=True, eq=False)
class Evaluation:
    """One configuration's result on one slice: sums of loss and their weights, or a failure."""

    losses: NDArray[np.float64] | None  # (windows,)
    weights: NDArray[np.float64] | None  # (windows,)
    failure: str | None
    seconds: float
