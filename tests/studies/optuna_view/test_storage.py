"""The studies of a store as an Optuna storage."""

import inspect

import optuna
import pytest
from optuna.storages import BaseStorage
from optuna.trial import TrialState

from apportion.studies.database import Store
from apportion.studies.optuna_view.export import export_study
from apportion.studies.optuna_view.storage import ReadOnly, ReadOnlyStorage

from .conftest import Written, specification, written


def states(storage: ReadOnlyStorage, study: Written) -> list[str]:
    trials = storage.get_all_trials(study.row.id, deepcopy=False)
    return [trial.state.name for trial in trials]


def test_optuna_loads_a_study_with_its_front_within_the_limits(study: Written) -> None:
    study.evaluate(study.propose(costs=(5e5, 4.5, 3.0)), loss=0.5)
    study.evaluate(study.propose(costs=(8e5, 4.5, 4.0)), loss=0.75)
    study.evaluate(study.propose(costs=(2e6, 8.5, 6.0)), loss=0.25)
    study.evaluate(study.propose(windows=2), loss=0.01)
    found = optuna.load_study(study_name="demo", storage=ReadOnlyStorage(study.store))
    assert found.metric_names == ["loss", "weight_bytes", "latency.here"]
    assert [trial.number for trial in found.best_trials] == [0]
    assert found.trials[1].values == [0.75, 8e5, 4.0]


def test_live_and_exported_trials_are_the_same(study: Written, tmp_path: object) -> None:
    study.evaluate(study.propose({"block.0": "drop"}))
    study.evaluate(study.propose(windows=2))
    study.fail(study.propose())
    url = f"sqlite:///{tmp_path}/trials.db"
    export_study(study.store, study.row, url)
    exported = optuna.load_study(study_name="demo", storage=url).trials
    live = optuna.load_study(study_name="demo", storage=ReadOnlyStorage(study.store)).trials
    for one, other in zip(exported, live, strict=True):
        one._trial_id = other._trial_id
        assert one == other


def test_trials_in_flight_are_running_while_the_study_is_run(study: Written) -> None:
    storage = ReadOnlyStorage(study.store)
    first, second = study.propose(), study.propose()
    assert states(storage, study) == ["RUNNING", "RUNNING"]
    study.evaluate(second)
    assert states(storage, study) == ["RUNNING", "COMPLETE"]
    study.evaluate(first)
    assert states(storage, study) == ["COMPLETE", "COMPLETE"]


def test_nothing_runs_once_the_driver_is_gone(study: Written) -> None:
    storage = ReadOnlyStorage(study.store)
    study.propose()
    study.evaluate(study.propose())
    study.store.release(study.lease)
    assert states(storage, study) == ["COMPLETE"]
    (trial,) = storage.get_all_trials(study.row.id)
    assert trial.number == 1
    found = storage.get_trial_id_from_study_id_trial_number(study.row.id, 1)
    assert storage.get_trial(found).number == 1


def test_trials_of_two_studies_have_ids_of_their_own(study: Written, store: Store) -> None:
    other = written(store, specification("other"))
    for one in (study, other):
        one.evaluate(one.propose(), loss=float(one.row.id))
    storage = ReadOnlyStorage(store)
    assert [found.study_name for found in storage.get_all_studies()] == ["demo", "other"]
    for one in (study, other):
        (trial,) = storage.get_all_trials(one.row.id)
        assert storage.get_trial(trial._trial_id).values[0] == one.row.id


def test_a_limit_that_becomes_known_reaches_trials_that_were_shown_before(study: Written) -> None:
    study.evaluate(study.propose(costs=(2e6, 4.5, 3.0)))
    storage = ReadOnlyStorage(study.store)
    (before,) = storage.get_all_trials(study.row.id)
    study.confirm({"weight_bytes": 1e6, "latency.here": 2.0})
    (after,) = storage.get_all_trials(study.row.id)
    assert before.system_attrs["constraints"] == [1.0]
    assert after.system_attrs["constraints"] == [1.0, 0.5]


def test_a_poll_works_out_no_trial_again(study: Written) -> None:
    for _ in range(3):
        study.evaluate(study.propose())
    storage = ReadOnlyStorage(study.store)
    before = storage.get_all_trials(study.row.id, deepcopy=False)
    study.evaluate(study.propose())
    after = storage.get_all_trials(study.row.id, deepcopy=False)
    assert len(after) == 4
    assert all(one is other for one, other in zip(before, after, strict=False))


def test_a_copy_can_be_changed_and_states_select(study: Written) -> None:
    study.evaluate(study.propose())
    study.fail(study.propose())
    storage = ReadOnlyStorage(study.store)
    (trial,) = storage.get_all_trials(study.row.id, states=(TrialState.FAIL,))
    trial.user_attrs["number"] = "changed"
    assert storage.get_trial(trial._trial_id).user_attrs["number"] == 1
    assert storage.get_n_trials(study.row.id, state=TrialState.COMPLETE) == 1


def test_a_name_that_was_forgotten_and_given_again_is_another_study(store: Store) -> None:
    storage = ReadOnlyStorage(store)
    first = written(store, specification(bits="4"))
    assert storage.get_study_system_attrs(first.row.id)["study:metric_names"] == ["loss", "bits"]
    store.forget(first.lease)
    second = written(store, specification(weight_bytes="1 MB"))
    names = storage.get_study_system_attrs(second.row.id)["study:metric_names"]
    assert names == ["loss", "weight_bytes"]


CHANGES = sorted(name for name in vars(BaseStorage) if name.startswith(("create", "delete", "set")))


@pytest.mark.parametrize("name", CHANGES)
def test_whatever_changes_something_is_refused(study: Written, name: str) -> None:
    method = getattr(ReadOnlyStorage(study.store), name)
    arguments = len(inspect.signature(method).parameters)
    with pytest.raises(ReadOnly, match="read-only: this is a view of apportion's studies"):
        method(*[study.row.id] * arguments)


def test_what_does_not_exist_is_a_key_error(study: Written) -> None:
    storage = ReadOnlyStorage(study.store)
    for look in (
        lambda: storage.get_study_id_from_name("none"),
        lambda: storage.get_study_name_from_id(99),
        lambda: storage.get_all_trials(99),
        lambda: storage.get_trial(99),
    ):
        with pytest.raises(KeyError):
            look()
