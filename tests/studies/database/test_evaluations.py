"""Evaluations are named by what they are of and shared, but for what a study's workers broke."""

from collections.abc import Callable

import numpy as np
import pytest

from apportion.studies.database import Evaluation, Lease, Store

KeyOf = Callable[[str], str]


@pytest.fixture
def other(store: Store, lease: Lease) -> Lease:
    return store.acquire(store.create_study("other", {}, "hash").id, 60)


def failed(error_class: str) -> Evaluation:
    return Evaluation(None, None, f"{error_class}: so it was", 0.5, error_class)


def test_exact_to_the_bit(store: Store, lease: Lease, key: KeyOf) -> None:
    values = [0.1, -0.0, 5e-324, 1.7e308, float("nan"), float("-inf")]
    losses = np.array(values, np.float64)
    store.record_evaluation(lease, key("a"), Evaluation(losses, losses[::-1], None, 1.5))
    stored = store.evaluations([key("a")])[key("a")]
    assert stored.losses is not None and stored.weights is not None
    assert stored.losses.tobytes() == losses.tobytes()
    assert stored.weights.tobytes() == losses[::-1].tobytes()
    assert (stored.failure, stored.error_class, stored.seconds) == (None, None, 1.5)


def test_first_writer_wins(store: Store, lease: Lease, other: Lease, key: KeyOf) -> None:
    for writer, loss in [(lease, 1.0), (other, 2.0)]:
        evaluation = Evaluation(np.array([loss]), np.ones(1), None, loss)
        store.record_evaluation(writer, key("a"), evaluation)
    assert store.evaluations([key("a")])[key("a")].losses == [1.0]


def test_many_keys(store: Store, lease: Lease, key: KeyOf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("apportion.studies.database.statements.KEYS_PER_QUERY", 2)
    for name in "abcde":
        store.record_evaluation(lease, key(name), Evaluation(None, None, name, 0.0, "raised"))
    found = store.evaluations(map(key, "abcdexyz"))
    assert {k: stored.failure for k, stored in found.items()} == {key(n): n for n in "abcde"}


@pytest.mark.parametrize("error_class", ["raised", "not finite"])
def test_failure_of_the_configuration_is_everybodys(
    store: Store, lease: Lease, other: Lease, key: KeyOf, error_class: str
) -> None:
    store.record_evaluation(lease, key("a"), failed(error_class))
    for study_id in (None, lease.study_id, other.study_id):
        stored = store.evaluations([key("a")], study_id)[key("a")]
        assert vars(stored) == vars(failed(error_class))


@pytest.mark.parametrize("error_class", ["timeout", "memory", "died"])
def test_failure_of_workers_is_their_studys(
    store: Store, lease: Lease, other: Lease, key: KeyOf, error_class: str
) -> None:
    store.record_evaluation(lease, key("a"), failed(error_class))
    assert store.evaluations([key("a")]) == {}
    assert store.evaluations([key("a")], other.study_id) == {}
    stored = store.evaluations([key("a")], lease.study_id)[key("a")]
    assert vars(stored) == vars(failed(error_class))


def test_result_of_another_study_stands_over_a_failure_of_workers(
    store: Store, lease: Lease, other: Lease, key: KeyOf
) -> None:
    store.record_evaluation(lease, key("a"), failed("died"))
    store.record_evaluation(other, key("a"), Evaluation(np.ones(1), np.ones(1), None, 1.0))
    assert store.evaluations([key("a")], lease.study_id)[key("a")].losses == [1.0]


def test_failure_of_workers_goes_with_its_study(store: Store, lease: Lease, key: KeyOf) -> None:
    store.record_evaluation(lease, key("a"), failed("memory"))
    assert store.forget(lease)
    again = store.create_study("demo", {}, "hash")
    assert store.evaluations([key("a")], again.id) == {}


def test_uses_stored_once(store: Store, lease: Lease, other: Lease, key: KeyOf) -> None:
    for keys in ("ab", "bc"):
        store.use_evaluations(lease, map(key, keys))
    store.use_evaluations(other, [key("a")])
    rows = store.database.read(
        lambda c: c.exec_driver_sql("SELECT study_id, evaluation_key FROM uses").all()
    )
    expected = [(lease.study_id, key(name)) for name in "abc"] + [(other.study_id, key("a"))]
    assert sorted((study, bytes(k).hex()) for study, k in rows) == sorted(expected)
