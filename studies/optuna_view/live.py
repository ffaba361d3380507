"""The trials of one study, followed while they come: what was read once is not read again."""

from optuna.trial import FrozenTrial

from apportion.studies.database.rows import StudyRow, TrialRow
from apportion.studies.database.store import Store
from apportion.studies.optuna_view.mapping import Mapped, mapped, version

MOST_TRIALS = 2**32
"""Of one study. Optuna's ids of trials are unique over all studies; our numbers are not."""


class LiveStudy:
    """A study as far as it was read. Not for several threads at a time.

    Proposals and evaluations never change; a limit becomes known once, and then the study is read
    anew for the constraints.
    """

    mapped: Mapped

    def __init__(self, store: Store, study: StudyRow) -> None:
        self._store = store
        self._begin(study, version(store, study))

    def trials(self, study: StudyRow) -> list[FrozenTrial]:
        """Those that are finished and, while `study` is being run, those in flight; by number."""
        self._refresh(study)
        found = list(self._finished)
        if study.state == "running" and study.is_owned:
            found += [_numbered(self.mapped.running(row), study, row) for row in self._waiting]
        return sorted(found, key=lambda trial: trial.number)

    def _begin(self, study: StudyRow, version: object) -> None:
        self.mapped = mapped(self._store, study)
        self._version = version
        self._read = 0
        self._waiting: list[TrialRow] = []
        self._finished: list[FrozenTrial] = []

    def _refresh(self, study: StudyRow) -> None:
        now = version(self._store, study)
        if now != self._version:
            self._begin(study, now)
        if self._store.trial_count(study.id) > self._read:
            new = self._store.trials(study.id, first=self._read)
            self._waiting += new
            self._read += len(new)
        keys = {row.evaluation_key for row in self._waiting}
        found = self._store.evaluations(keys, study.id) if keys else {}
        done = [row for row in self._waiting if row.evaluation_key in found]
        self._waiting = [row for row in self._waiting if row.evaluation_key not in found]
        self._finished += [
            _numbered(self.mapped.finished(row, found[row.evaluation_key]), study, row)
            for row in done
        ]


def trial_id(study_id: int, number: int) -> int:
    """Optuna's id of a trial; `divmod` with `MOST_TRIALS` undoes it."""
    return study_id * MOST_TRIALS + number


def _numbered(trial: FrozenTrial, study: StudyRow, row: TrialRow) -> FrozenTrial:
    trial.number = row.number
    trial._trial_id = trial_id(study.id, row.number)
    return trial
