"""The studies of a store as an Optuna storage that can only be read."""

import copy
from collections.abc import Callable, Container, Sequence
from threading import Lock
from typing import Any, NoReturn

from optuna.distributions import BaseDistribution
from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from optuna.study._frozen import FrozenStudy
from optuna.trial import FrozenTrial, TrialState

from apportion.errors import ApportionError
from apportion.studies.database.rows import StudyRow
from apportion.studies.database.store import Store
from apportion.studies.optuna_view.live import MOST_TRIALS, LiveStudy, trial_id
from apportion.studies.optuna_view.mapping import MARK, mark

READ_ONLY = "read-only: this is a view of apportion's studies"
METRIC_NAMES = "study:metric_names"
"""The system attribute behind Optuna's `set_metric_names`."""


class ReadOnly(ApportionError):
    """Somebody tried to change a study through this view of it."""


class ReadOnlyStorage(BaseStorage):
    """All studies of a store, live. May be used by several threads.

    Numbers of trials are those of the store. Trials in flight are there, as RUNNING, only while a
    process runs their study, so the numbers of a stopped study may have gaps.

    Whatever changes something raises ReadOnly; what does not exist raises KeyError.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._live: dict[tuple[int, float], LiveStudy] = {}
        self._lock = Lock()

    def get_all_studies(self) -> list[FrozenStudy]:
        """See `BaseStorage`."""
        return [self._frozen(study) for study in self._store.studies()]

    def get_study_id_from_name(self, study_name: str) -> int:
        """See `BaseStorage`."""
        return self._study(lambda study: study.name == study_name, study_name).id

    def get_study_name_from_id(self, study_id: int) -> str:
        """See `BaseStorage`."""
        return self._of(study_id).name

    def get_study_directions(self, study_id: int) -> list[StudyDirection]:
        """See `BaseStorage`."""
        return self._frozen(self._of(study_id)).directions

    def get_study_user_attrs(self, study_id: int) -> dict[str, Any]:
        """See `BaseStorage`."""
        return dict(self._frozen(self._of(study_id)).user_attrs)

    def get_study_system_attrs(self, study_id: int) -> dict[str, Any]:
        """See `BaseStorage`."""
        return dict(self._frozen(self._of(study_id)).system_attrs)

    def get_trial(self, trial_id: int) -> FrozenTrial:
        """See `BaseStorage`."""
        study_id, number = divmod(trial_id, MOST_TRIALS)
        for trial in self.get_all_trials(study_id, deepcopy=False):
            if trial.number == number:
                return trial
        raise KeyError(f"no trial {trial_id}")

    def get_trial_id_from_study_id_trial_number(self, study_id: int, trial_number: int) -> int:
        """See `BaseStorage`, which takes the number for a place in the list."""
        return self.get_trial(trial_id(study_id, trial_number))._trial_id

    def get_all_trials(
        self,
        study_id: int,
        deepcopy: bool = True,
        states: Container[TrialState] | None = None,
    ) -> list[FrozenTrial]:
        """See `BaseStorage`."""
        study = self._of(study_id)
        with self._lock:
            trials = self._live_of(study).trials(study)
        found = [trial for trial in trials if states is None or trial.state in states]
        return copy.deepcopy(found) if deepcopy else found

    def _of(self, study_id: int) -> StudyRow:
        return self._study(lambda study: study.id == study_id, study_id)

    def _study(self, wanted: Callable[[StudyRow], bool], name: object) -> StudyRow:
        for study in self._store.studies():
            if wanted(study):
                return study
        raise KeyError(f"no study {name}")

    def _live_of(self, study: StudyRow) -> LiveStudy:
        # a number is given out again when a study is forgotten, its time is not
        key = (study.id, study.created_at)
        if key not in self._live:
            self._live[key] = LiveStudy(self._store, study)
        return self._live[key]

    def _frozen(self, study: StudyRow) -> FrozenStudy:
        with self._lock:
            names = self._live_of(study).mapped.metric_names
        return FrozenStudy(
            study_name=study.name,
            direction=None,
            directions=[StudyDirection.MINIMIZE] * len(names),
            user_attrs={MARK: mark(study), "state": study.state, "stage": study.stage},
            system_attrs={METRIC_NAMES: names},
            study_id=study.id,
        )

    def create_new_study(
        self, directions: Sequence[StudyDirection], study_name: str | None = None
    ) -> int:
        """Refused."""
        _refuse()

    def delete_study(self, study_id: int) -> None:
        """Refused."""
        _refuse()

    def set_study_user_attr(self, study_id: int, key: str, value: Any) -> None:
        """Refused."""
        _refuse()

    def set_study_system_attr(self, study_id: int, key: str, value: Any) -> None:
        """Refused."""
        _refuse()

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        """Refused."""
        _refuse()

    def set_trial_param(
        self,
        trial_id: int,
        param_name: str,
        param_value_internal: float,
        distribution: BaseDistribution,
    ) -> None:
        """Refused."""
        _refuse()

    def set_trial_state_values(
        self, trial_id: int, state: TrialState, values: Sequence[float] | None = None
    ) -> bool:
        """Refused."""
        _refuse()

    def set_trial_intermediate_value(
        self, trial_id: int, step: int, intermediate_value: float
    ) -> None:
        """Refused."""
        _refuse()

    def set_trial_user_attr(self, trial_id: int, key: str, value: Any) -> None:
        """Refused."""
        _refuse()

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        """Refused."""
        _refuse()


def _refuse() -> NoReturn:
    raise ReadOnly(READ_ONLY)
