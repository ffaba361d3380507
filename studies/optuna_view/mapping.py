"""What a study and its trials are in Optuna's words: the one place where that is decided."""

import datetime
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from optuna.trial import FrozenTrial, TrialState, create_trial

from apportion.hashing import content_hash
from apportion.studies.database.rows import Evaluation, StudyRow, TrialRow
from apportion.studies.database.store import Store
from apportion.studies.limits import parse_limit
from apportion.studies.optuna_view.aggregates import Aggregates, distributions
from apportion.studies.specification import StudySpec

LOSS, NUMBER, MARK = "loss", "number", "apportion"
PART = "search"
CONSTRAINTS = "constraints"
"""The system attribute that optuna-dashboard reads; Optuna 5 writes others and reads both."""


@dataclass(frozen=True)
class Mapped:
    """A study as Optuna sees it.

    Its objectives, all minimized: the mean search loss, and each cost that the specification
    limits, in the cost's unit; kinds that are limited later, at a resume, become constraints only.

    * COMPLETE: scored on the full search slice. Only these are comparable.
    * PRUNED: scored on a part of it. It has no values: its `loss_on_part` is a user attribute,
      beside `windows`, for it cannot be compared with a loss on the full slice.
    * FAIL: what failed, or lost without bound; `failure` says why.

    A trial's constraints are cost / limit - 1, one for each limit in force in its round. The value
    of a relative limit ("0.5x dense") is known once the round is confirmed; until then it is left
    out. The store keeps no clock of trials: all begin with the study, and only the length is true.

    Attributes:
        kinds: the limited costs, in the order of the file.
        windows: length of the full search slice.
        stated: first round -> kind -> limit, in the kind's unit; None: a relative one.
        confirmed: round -> kind -> limit, of rounds that are confirmed.
    """

    began: datetime.datetime
    kinds: tuple[str, ...]
    windows: int
    aggregates: Aggregates
    stated: Mapping[int, Mapping[str, float | None]]
    confirmed: Mapping[int, Mapping[str, float]]

    @property
    def metric_names(self) -> list[str]:
        """Of the objectives, in order."""
        return [LOSS, *self.kinds]

    def finished(self, trial: TrialRow, evaluation: Evaluation) -> FrozenTrial:
        """A trial whose evaluation is stored."""
        loss, attributes = _loss(evaluation), self._attributes(trial)
        attributes["seconds"] = evaluation.seconds
        values = None
        if not math.isfinite(loss):
            state = TrialState.FAIL
            attributes["failure"] = evaluation.failure or "the loss is not finite"
        elif (trial.part, trial.first_window, trial.windows) == (PART, 0, self.windows):
            state = TrialState.COMPLETE
            values = [loss, *(trial.costs[kind] for kind in self.kinds)]
        else:
            state = TrialState.PRUNED
            attributes["loss_on_part"] = loss
        found = self._trial(trial, state, values, attributes)
        found.datetime_complete = self.began + datetime.timedelta(seconds=evaluation.seconds)
        return found

    def running(self, trial: TrialRow) -> FrozenTrial:
        """A trial that is being evaluated."""
        return self._trial(trial, TrialState.RUNNING, None, self._attributes(trial))

    def _trial(
        self,
        trial: TrialRow,
        state: TrialState,
        values: list[float] | None,
        attributes: dict[str, Any],
    ) -> FrozenTrial:
        parameters = self.aggregates.values(trial)
        found = create_trial(
            state=state,
            values=values,
            params=parameters,
            distributions=distributions(parameters),
            user_attrs=attributes,
            system_attrs={CONSTRAINTS: self._constraints(trial)},
        )
        found.datetime_start = self.began
        return found

    def _attributes(self, trial: TrialRow) -> dict[str, Any]:
        return {
            NUMBER: trial.number,
            "origin": trial.origin,
            "windows": trial.windows,
            "round": trial.round,
            "configuration": content_hash(dict(trial.configuration)),
            "evaluation": trial.evaluation_key,
        }

    def _constraints(self, trial: TrialRow) -> list[float]:
        limits: dict[str, float | None] = {}
        for first, values in self.stated.items():
            if first <= trial.round:
                limits |= values
        limits |= self.confirmed.get(trial.round, {})
        return [trial.costs[kind] / limit - 1 for kind, limit in limits.items() if limit]


def mapped(store: Store, study: StudyRow) -> Mapped:
    """A study with all that its stages have said so far."""
    spec = StudySpec(**study.specification)
    discovered = store.stage_output(study.id, "discover") or {}
    found = discovered.get("windows", {}).get(PART, spec.search.windows)
    stated = {0: _values(spec.limits)}
    for change in store.changes(study.id):
        stated.setdefault(change.first_round, {})
        stated[change.first_round] |= _values(change.values.get("limits", {}))
    return Mapped(
        began=datetime.datetime.fromtimestamp(study.created_at),
        kinds=tuple(limit.kind for limit in spec.parsed_limits),
        windows=min(spec.search.windows, found),
        aggregates=Aggregates.of(spec),
        stated=stated,
        confirmed={
            round: _confirmed(store.stage_output(study.id, "confirm", round))
            for round in store.stage_rounds(study.id, "confirm")
        },
    )


def version(store: Store, study: StudyRow) -> object:
    """Changes when `mapped` would give something else; cheap."""
    stages = [store.stage_rounds(study.id, stage) for stage in ("discover", "confirm")]
    return stages, len(store.changes(study.id))


def mark(study: StudyRow) -> dict[str, Any]:
    """What tells a study of ours from any other of its name."""
    return {"specification": study.specification_hash, "created": study.created_at}


def _loss(evaluation: Evaluation) -> float:
    if evaluation.failure is not None or evaluation.losses is None or evaluation.weights is None:
        return math.inf
    return float(evaluation.losses.sum() / evaluation.weights.sum())


def _values(limits: Mapping[str, str | float]) -> dict[str, float | None]:
    return {kind: parse_limit(kind, text).value for kind, text in limits.items()}


def _confirmed(output: Mapping[str, Any] | None) -> dict[str, float]:
    limits = (output or {}).get("limits", {})
    return {kind: float(found["value"]) for kind, found in limits.items()}
