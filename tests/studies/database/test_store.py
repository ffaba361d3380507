"""What goes into the store comes out of it, in a file."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from apportion.errors import ApportionError, InvalidInput
from apportion.studies.database import Evaluation, Lease, NewTrial, Store, check_name

NewTrialOf = Callable[[str], NewTrial]


@pytest.mark.parametrize("name", ["a", "llama-1b.on_this-box", "0" * 64])
def test_name_allowed(name: str) -> None:
    check_name(name)


@pytest.mark.parametrize("name", ["", "A", "a b", "a/b", "ü", "a\n", "0" * 65])
def test_name_refused(name: str, store: Store) -> None:
    with pytest.raises(InvalidInput, match="cannot name a study"):
        store.create_study(name, {}, "hash")


def test_study_found_by_name(store: Store) -> None:
    made = store.create_study("demo", {"search": {"tokens": 8}, "limits": [0.5]}, "hash")
    found = store.find_study("demo")
    assert found is not None
    assert replace(found, lease_left=made.lease_left) == made
    assert (made.specification, made.state) == (
        {"search": {"tokens": 8}, "limits": [0.5]},
        "stopped",
    )
    assert store.find_study("other") is None


def test_study_name_taken(store: Store) -> None:
    store.create_study("demo", {}, "hash")
    with pytest.raises(InvalidInput, match='"demo"'):
        store.create_study("demo", {}, "hash")
    assert [study.name for study in store.studies()] == ["demo"]


def test_state_stored(store: Store, lease: Lease) -> None:
    store.set_state(lease, "failed", "search", "the disk is full")
    study = store.studies()[0]
    assert (study.state, study.stage, study.message) == ("failed", "search", "the disk is full")


def test_state_unknown(store: Store, lease: Lease) -> None:
    with pytest.raises(ApportionError, match="ck_studies_state"):
        store.set_state(lease, "paused", "search", "")


def test_stage_output_kept_by_round(store: Store, lease: Lease) -> None:
    store.record_stage(lease, "search", 0, {"best": [0.1, None]}, 1.5)
    store.record_stage(lease, "search", 1, {"best": []}, 1.5)
    assert store.stage_output(lease.study_id, "search") == {"best": [0.1, None]}
    assert store.stage_output(lease.study_id, "search", 1) == {"best": []}
    assert store.stage_output(lease.study_id, "confirm") is None


def test_stage_output_never_replaced(store: Store, lease: Lease) -> None:
    store.record_stage(lease, "profile", 0, {"table": 1}, 1.5)
    store.record_stage(lease, "profile", 0, {"table": 1}, 9.9)
    with pytest.raises(ApportionError, match="profile"):
        store.record_stage(lease, "profile", 0, {"table": 2}, 1.5)
    assert store.stage_output(lease.study_id, "profile") == {"table": 1}


def test_trials_come_back_as_proposed(store: Store, lease: Lease, new_trial: NewTrialOf) -> None:
    proposed = replace(new_trial("key"), vector=[1, 0, 7])
    store.record_proposals(lease, 0, [proposed], {})
    (trial,) = store.trials(lease.study_id)
    assert {field: getattr(trial, field) for field in vars(proposed)} == vars(proposed)
    assert (trial.number, trial.round) == (0, 0)


def test_trials_numbered_over_rounds(store: Store, lease: Lease, new_trial: NewTrialOf) -> None:
    for round, keys, numbers in [(0, "ab", range(2)), (1, "c", range(2, 3)), (0, "d", range(3, 4))]:
        assert store.record_proposals(lease, round, [*map(new_trial, keys)], {}) == numbers
    stored = [(trial.number, trial.evaluation_key) for trial in store.trials(lease.study_id)]
    assert stored == list(enumerate("abcd"))
    assert [trial.number for trial in store.trials(lease.study_id, round=0)] == [0, 1, 3]


def test_trials_numbered_within_study(store: Store, lease: Lease, new_trial: NewTrialOf) -> None:
    other = store.acquire(store.create_study("other", {}, "hash").id, 60)
    store.record_proposals(lease, 0, [new_trial("a"), new_trial("b")], {})
    assert store.record_proposals(other, 0, [new_trial("a")], {}) == range(1)


def test_solver_state_is_the_last(store: Store, lease: Lease) -> None:
    assert store.solver_state(lease.study_id, 0) is None
    for state in ({"ilp": [1, 2]}, {"ilp": [3]}):
        store.record_proposals(lease, 0, [], state)
    assert store.solver_state(lease.study_id, 0) == {"ilp": [3]}
    assert store.solver_state(lease.study_id, 1) is None


def test_proposals_with_a_bad_trial_store_nothing(
    store: Store, lease: Lease, new_trial: NewTrialOf
) -> None:
    bad = replace(new_trial("b"), part="test")
    with pytest.raises(ApportionError, match="ck_trials_part"):
        store.record_proposals(lease, 0, [new_trial("a"), bad], {"asked": 2})
    assert store.trials(lease.study_id) == []
    assert store.solver_state(lease.study_id, 0) is None


@given(st.lists(st.floats(), max_size=5))
def test_evaluation_exact_to_the_bit(
    tmp_path_factory: pytest.TempPathFactory, values: list[float]
) -> None:
    store = Store.open(tmp_path_factory.mktemp("exact") / "studies.db")
    losses = np.array(values, np.float64)
    store.record_evaluation("key", Evaluation(losses, losses[::-1], None, 1.5))
    stored = store.evaluations(["key"])["key"]
    store.close()
    assert stored.losses is not None and stored.weights is not None
    assert stored.losses.tobytes() == losses.tobytes()
    assert stored.weights.tobytes() == losses[::-1].tobytes()


def test_evaluation_failed(store: Store) -> None:
    store.record_evaluation("key", Evaluation(None, None, "loss is not finite", 0.5))
    stored = store.evaluations(["key"])["key"]
    assert (stored.losses, stored.weights, stored.failure) == (None, None, "loss is not finite")


def test_evaluation_first_writer_wins(store: Store) -> None:
    for loss in (1.0, 2.0):
        store.record_evaluation("key", Evaluation(np.array([loss]), np.ones(1), None, loss))
    assert store.evaluations(["key"])["key"].losses == [1.0]


def test_evaluations_of_many_keys(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("apportion.studies.database.statements.KEYS_PER_QUERY", 2)
    for key in "abcde":
        store.record_evaluation(key, Evaluation(None, None, key, 0.0))
    found = store.evaluations([*"abcdexyz"])
    assert {key: stored.failure for key, stored in found.items()} == {key: key for key in "abcde"}


def test_measurements_never_overwritten(store: Store) -> None:
    store.record_measurements("this box", {"matmul": {"ms": 1.25}})
    store.record_measurements("this box", {"matmul": {"ms": 9.0}, "conv": {"ms": 2.0}})
    store.record_measurements("other box", {"matmul": {"ms": 7.0}})
    found = store.measurements("this box")
    assert found == {"matmul": {"ms": 1.25}, "conv": {"ms": 2.0}}


def test_configuration_text_is_canonical(
    store: Store, lease: Lease, new_trial: NewTrialOf, path: Path
) -> None:
    store.record_proposals(lease, 0, [new_trial("a")], {})
    with store._database.reading() as connection:
        text = connection.exec_driver_sql("SELECT configuration FROM trials").scalar_one()
    assert text == json.dumps({"a.site": "dense", "b.site": "w4g64"}, separators=(",", ":"))


def test_writers_wait_for_each_other(store: Store, new_trial: NewTrialOf) -> None:
    def drive(name: str) -> list[range]:
        lease = store.acquire(store.create_study(name, {}, "hash").id, 60)
        return [store.record_proposals(lease, 0, [new_trial(name)], {}) for _ in range(20)]

    with ThreadPoolExecutor(4) as pool:
        for numbers in pool.map(drive, "abcd"):
            assert numbers == [range(i, i + 1) for i in range(20)]


def test_store_opened_again_holds_all(store: Store, lease: Lease, path: Path) -> None:
    store.record_stage(lease, "discover", 0, {"sites": 42}, 0.4)
    store.close()
    again = Store.open(f"sqlite:///{path}")
    assert again.stage_output(lease.study_id, "discover") == {"sites": 42}
    again.close()
