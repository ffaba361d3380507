"""Between rows of the tables and what the store hands out."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
from sqlalchemy import Row

from apportion.hashing import canonical_json, content_hash
from apportion.studies.database.owners import Owner
from apportion.studies.database.packing import (
    pack_floats,
    pack_indices,
    unpack_floats,
    unpack_indices,
)
from apportion.studies.database.rows import Evaluation, Layout, NewTrial, StudyRow, TrialRow


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
        stop=row.stop,
    )


def owner_text(owner: Owner) -> str:
    """The column `studies.owner`."""
    return canonical_json(asdict(owner))


def key_bytes(key: str) -> bytes:
    """An evaluation's key, 32 hexadecimal digits, as stored."""
    return bytes.fromhex(key)


def layout_columns(layout: Layout) -> dict[str, Any]:
    """The columns of `layouts`."""
    value = {"options": list(layout.options.items()), "costs": list(layout.costs)}
    return {"hash": bytes.fromhex(content_hash(value)), "layout": canonical_json(value)}


def layout_of(text: str) -> Layout:
    """The column `layouts.layout`."""
    value = json.loads(text)
    options = {site: tuple(options) for site, options in value["options"]}
    return Layout(options, tuple(value["costs"]))


def trial_columns(trial: NewTrial, layout: Layout) -> dict[str, Any]:
    """The columns of `trials` that the proposal gives."""
    chosen, places = trial.configuration, layout.places
    vector = trial.vector
    return {
        "configuration": pack_indices([places[site][chosen[site]] for site in places]),
        "first_window": trial.first_window,
        "windows": trial.windows,
        "part": trial.part,
        "origin": trial.origin,
        "vector": None if vector is None else pack_indices(vector),
        "costs": pack_floats(np.array([trial.costs[kind] for kind in layout.costs], np.float64)),
        "evaluation_key": key_bytes(trial.evaluation_key),
    }


def trial_of(row: Row[Any], layouts: Mapping[int, Layout]) -> TrialRow:
    """A row of `trials`."""
    layout = layouts[row.layout_id]
    indices = unpack_indices(row.configuration)
    costs = unpack_floats(row.costs).tolist()
    return TrialRow(
        number=row.number,
        round=row.round,
        configuration={
            site: options[index]
            for (site, options), index in zip(layout.options.items(), indices, strict=True)
        },
        first_window=row.first_window,
        windows=row.windows,
        part=row.part,
        origin=row.origin,
        vector=None if row.vector is None else unpack_indices(row.vector),
        costs=dict(zip(layout.costs, costs, strict=True)),
        evaluation_key=row.evaluation_key.hex(),
    )


def evaluation_of(row: Row[Any]) -> Evaluation:
    """A row of `evaluations`."""
    losses = None if row.losses is None else unpack_floats(row.losses)
    weights = None if row.weights is None else unpack_floats(row.weights)
    return Evaluation(losses, weights, row.failure, row.seconds, row.error_class)


def evaluation_columns(evaluation: Evaluation) -> dict[str, Any]:
    """The columns of `evaluations` that the result gives."""
    losses, weights = evaluation.losses, evaluation.weights
    return {
        "losses": None if losses is None else pack_floats(losses),
        "weights": None if weights is None else pack_floats(weights),
        "failure": evaluation.failure,
        "error_class": evaluation.error_class,
        "seconds": evaluation.seconds,
    }
