"""What goes into the store and comes out of it."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
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

    `epoch` counts the leases of the study; `seconds` is how long it stands without `renew`;
    `token` tells it from the leases of a removed study that had the same number.
    """

    study_id: int
    epoch: int
    seconds: float
    token: str = ""


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
    stop: str | None = None  # "gently", "now"

    @property
    def is_owned(self) -> bool:
        """Whether a process runs it: a "running" study without owner was interrupted."""
        return self.owner is not None and self.lease_left > 0 and not self.owner.is_dead()


@dataclass(frozen=True)
class Change:
    """What a `resume` changed of the specification: nothing else of it ever changes.

    Attributes:
        number: from 0, within the study.
        first_round: the round that searches with it first.
        created_at: seconds since 1970.
        values: "limits": kind -> text, "tokens", "workers"; only what changed.
    """

    number: int
    first_round: int
    created_at: float
    values: dict[str, Any]


@dataclass(frozen=True)
class Layout:
    """How trials are packed: the options of each site and the kinds of cost, in order."""

    options: Mapping[str, Sequence[str]]
    costs: Sequence[str]

    @cached_property
    def places(self) -> dict[str, dict[str, int]]:
        """Site -> option -> its index."""
        return {
            site: {option: index for index, option in enumerate(options)}
            for site, options in self.options.items()
        }


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
    vector: Sequence[int] | None = None


@dataclass(frozen=True, kw_only=True)
class TrialRow(NewTrial):
    """A stored trial: `number` counts from 0 within the study, over all its rounds."""

    number: int
    round: int


@dataclass(frozen=True, eq=False)
class Evaluation:
    """One configuration's result on one slice: sums of loss and their weights, or a failure.

    Attributes:
        losses: [windows]; 4 bytes each are stored where float32 holds them exactly, else 8.
        weights: [windows].
        error_class: of a failure: "raised" and "not finite" are the configuration's own,
            "timeout", "memory" and "died" those of the study's workers.
    """

    losses: NDArray[np.float64] | None
    weights: NDArray[np.float64] | None
    failure: str | None
    seconds: float
    error_class: str | None = None
