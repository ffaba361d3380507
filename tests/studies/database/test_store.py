"""What studies and their stages put into the store comes out of it, on both engines."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from sqlalchemy import Connection

from apportion.errors import ApportionError, InvalidInput
from apportion.studies.database import Layout, Lease, NewTrial, Store, check_name

NewTrialOf = Callable[[str], NewTrial]


@pytest.mark.parametrize("name", ["a", "llama-1b.on_this-box", "0" * 64])
def test_name_allowed(name: str) -> None:
    check_name(name)


@pytest.mark.parametrize("name", ["", "A", "a b", "a/b", "ü", "a\n", "0" * 65])
def test_name_refused(name: str) -> None:
    with pytest.raises(InvalidInput, match="cannot name a study"):
        check_name(name)


def test_study_of_a_bad_name_refused(store: Store) -> None:
    with pytest.raises(InvalidInput, match="cannot name a study"):
        store.create_study("A b", {}, "hash")
    assert store.studies() == []


def test_study_found_by_name(store: Store) -> None:
    specification = {"search": {"tokens": 8}, "limits": [0.5], "a": None, "ü": "é\n"}
    made = store.create_study("demo", specification, "hash")
    found = store.find_study("demo")
    assert found is not None
    assert replace(found, lease_left=made.lease_left) == made
    assert (made.specification, made.state) == (specification, "stopped")
    assert list(made.specification) == list(specification)
    assert store.find_study("other") is None


def test_study_name_taken(store: Store) -> None:
    store.create_study("demo", {}, "hash")
    with pytest.raises(InvalidInput, match='there is a study "demo" already'):
        store.create_study("demo", {}, "hash")
    assert [study.name for study in store.studies()] == ["demo"]


def test_name_goes_to_one_of_eight_who_want_it(store: Store) -> None:
    def create(_: int) -> str:
        try:
            return store.create_study("demo", {}, "hash").name
        except InvalidInput as error:
            assert "there is a study" in str(error)
            return ""

    with ThreadPoolExecutor(8) as pool:
        assert sorted(pool.map(create, range(8))) == [""] * 7 + ["demo"]


def test_state_stored(store: Store, lease: Lease) -> None:
    store.set_state(lease, "failed", "search", "the disk is full")
    study = store.studies()[0]
    assert (study.state, study.stage, study.message) == ("failed", "search", "the disk is full")


def test_state_unknown(store: Store, lease: Lease) -> None:
    with pytest.raises(ApportionError, match="ck_studies_state") as error:
        store.set_state(lease, "paused", "search", "")
    assert "\n" not in str(error.value)
    assert store.studies()[0].state == "stopped"


def test_stage_output_kept_by_round(store: Store, lease: Lease) -> None:
    store.record_stage(lease, "search", 1, {"best": []}, 1.5)
    store.record_stage(lease, "search", 0, {"best": [0.1, None]}, 1.5)
    assert store.stage_output(lease.study_id, "search") == {"best": [0.1, None]}
    assert store.stage_output(lease.study_id, "search", 1) == {"best": []}
    assert store.stage_output(lease.study_id, "confirm") is None
    assert store.stage_rounds(lease.study_id, "search") == [0, 1]
    assert store.stage_seconds(lease.study_id) == {"search": 3.0}


def test_stage_output_never_replaced(store: Store, lease: Lease) -> None:
    store.record_stage(lease, "profile", 0, {"table": 1}, 1.5)
    with pytest.raises(ApportionError, match="profile"):
        store.record_stage(lease, "profile", 0, {"table": 2}, 1.5)
    assert store.stage_output(lease.study_id, "profile") == {"table": 1}


def test_changes_in_order(store: Store, lease: Lease) -> None:
    assert store.changes(lease.study_id) == []
    store.record_change(lease, 0, {"tokens": 8})
    store.record_change(lease, 1, {"limits": {"bits": "4"}, "workers": 2})
    store.record_change(lease, 1, {"tokens": 8})
    found = store.changes(lease.study_id)
    assert [change.number for change in found] == [0, 1, 2]
    assert [change.first_round for change in found] == [0, 1, 1]
    assert found[1].values == {"limits": {"bits": "4"}, "workers": 2}


def test_bills_add_up_over_leases(store: Store, lease: Lease) -> None:
    store.record_bill(lease, {"done": (3, 1.5)})
    store.record_bill(lease, {"done": (5, 2.5), "failed": (1, 0.25)})  # so far, all told
    store.release(lease)
    store.record_bill(store.acquire(lease.study_id, 60), {"done": (2, 0.5)})
    assert store.bill(lease.study_id) == {"done": (7, 3.0), "failed": (1, 0.25)}


def test_study_without_trials_forgotten(store: Store, lease: Lease) -> None:
    store.record_stage(lease, "discover", 0, {}, 0.5)
    store.record_change(lease, 0, {"workers": 2})
    assert store.forget(lease)
    assert store.studies() == []
    assert store.create_study("demo", {}, "hash").state == "stopped"


def test_study_with_trials_not_forgotten(
    store: Store, lease: Lease, layout: Layout, new_trial: NewTrialOf
) -> None:
    store.record_proposals(lease, 0, 0, layout, [new_trial("a")], {})
    assert not store.forget(lease)
    assert len(store.trials(lease.study_id)) == 1


def test_measurements_never_overwritten(store: Store) -> None:
    store.record_measurements("this box", {"matmul": {"ms": 1.25}})
    store.record_measurements("this box", {"matmul": {"ms": 9.0}, "conv": {"ms": 2.0}})
    store.record_measurements("other box", {"matmul": {"ms": 7.0}})
    found = store.measurements("this box")
    assert found == {"matmul": {"ms": 1.25}, "conv": {"ms": 2.0}}


def test_reading_sees_one_state(store: Store) -> None:
    count = "SELECT count(*) FROM studies"

    def work(connection: Connection) -> tuple[object, object]:
        before = connection.exec_driver_sql(count).scalar()
        store.create_study("demo", {}, "hash")
        return before, connection.exec_driver_sql(count).scalar()

    assert store.database.read(work) == (0, 0)
    assert len(store.studies()) == 1


def test_writing_that_raises_leaves_nothing(store: Store, lease: Lease) -> None:
    def work(connection: Connection) -> None:
        connection.exec_driver_sql("DELETE FROM studies")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        store.database.write(work)
    assert [study.name for study in store.studies()] == ["demo"]


def test_store_opened_again_holds_all(store: Store, lease: Lease, address: str) -> None:
    store.record_stage(lease, "discover", 0, {"sites": 42}, 0.4)
    store.close()
    again = Store.open(address)
    assert again.stage_output(lease.study_id, "discover") == {"sites": 42}
    again.close()
