"""Between rows of the tables and what the store hands out: JSON, and float64 as bytes."""

import json
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Row

from apportion.hashing import canonical_json
from apportion.studies.database.owners import Owner
from apportion.studies.database.rows import Evaluation, NewTrial, StudyRow, TrialRow

FLOAT64 = np.dtype("<f8")  # the same file on every machine


def study_of(row: Row[Any]) -> StudyRow:
    """A row of `statements.STUDIES`."""
    return StudyRow(
        id=row.id,
        name=row.name,
        specification=json.loads(row.specification),
        specification_hash=row.specification_hash,
        created_at=row.created_at,
        state=row.state,
        stage=row.stage,
        message=row.message,
        owner=None if row.owner is None else Owner(**json.loads(row.owner)),
        epoch=row.epoch,
        lease_left=row.lease_left,
    )


def owner_text(owner: Owner) -> str:
    """The column `studies.owner`."""
    return canonical_json(asdict(owner))


def trial_columns(trial: NewTrial) -> dict[str, Any]:
    """The columns of `trials` that the proposal gives."""
    return {
        "configuration": canonical_json(dict(trial.configuration)),
        "first_window": trial.first_window,
        "windows": trial.windows,
        "part": trial.part,
        "origin": trial.origin,
        "vector": None if trial.vector is None else canonical_json(list(trial.vector)),
        "costs": canonical_json(dict(trial.costs)),
        "evaluation_key": trial.evaluation_key,
    }


def trial_of(row: Row[Any]) -> TrialRow:
    """A row of `trials`."""
    return TrialRow(
        number=row.number,
        round=row.round,
        configuration=json.loads(row.configuration),
        first_window=row.first_window,
        windows=row.windows,
        part=row.part,
        origin=row.origin,
        vector=None if row.vector is None else json.loads(row.vector),
        costs=json.loads(row.costs),
        evaluation_key=row.evaluation_key,
    )


def evaluation_of(row: Row[Any]) -> Evaluation:
    """A row of `evaluations`."""
    return Evaluation(_array(row.losses), _array(row.weights), row.failure, row.seconds)


def evaluation_columns(evaluation: Evaluation) -> dict[str, Any]:
    """The columns of `evaluations` that the result gives."""
    return {
        "losses": _blob(evaluation.losses),
        "weights": _blob(evaluation.weights),
        "failure": evaluation.failure,
        "seconds": evaluation.seconds,
    }


def _blob(values: NDArray[np.float64] | None) -> bytes | None:
    return None if values is None else values.astype(FLOAT64).tobytes()


def _array(blob: bytes | None) -> NDArray[np.float64] | None:
    return None if blob is None else np.frombuffer(blob, FLOAT64).astype(np.float64)
