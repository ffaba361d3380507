"""Trials come back as proposed, numbered, together with what their solver computed."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from sqlalchemy import text

from apportion.errors import ApportionError
from apportion.studies.database import Layout, Lease, NewTrial, Store

NewTrialOf = Callable[[str], NewTrial]
KeyOf = Callable[[str], str]


def test_trials_come_back_as_proposed(
    store: Store, lease: Lease, layout: Layout, new_trial: NewTrialOf
) -> None:
    proposed = [replace(new_trial("a"), vector=[1, 0, 700]), new_trial("b")]
    store.record_proposals(lease, 0, 0, layout, proposed, {})
    for number, (trial, back) in enumerate(
        zip(proposed, store.trials(lease.study_id), strict=True)
    ):
        assert {field: getattr(back, field) for field in vars(trial)} == vars(trial)
        assert (back.number, back.round) == (number, 0)


def test_order_of_sites_is_the_layouts(
    store: Store, lease: Lease, layout: Layout, new_trial: NewTrialOf
) -> None:
    trial = replace(new_trial("a"), configuration={"a.site": "dense", "b.site": "w4g64"})
    store.record_proposals(lease, 0, 0, layout, [trial], {})
    (back,) = store.trials(lease.study_id)
    assert list(back.configuration.items()) == [("b.site", "w4g64"), ("a.site", "dense")]


def test_site_of_more_options_than_a_byte_counts(
    store: Store, lease: Lease, new_trial: NewTrialOf
) -> None:
    layout = Layout({"a": [f"s{i}%" for i in range(300)], "b": ["dense"]}, [])
    trial = replace(new_trial("a"), configuration={"a": "s299%", "b": "dense"}, costs={})
    store.record_proposals(lease, 0, 0, layout, [trial], {})
    assert store.trials(lease.study_id)[0].configuration == trial.configuration


def test_layouts_may_change_between_rounds(
    store: Store, lease: Lease, layout: Layout, new_trial: NewTrialOf
) -> None:
    other = Layout({"c.site": ["drop", "keep"]}, ["bytes", "latency.cpu"])
    later = replace(
        new_trial("b"),
        configuration={"c.site": "keep"},
        costs={"bytes": 1.0, "latency.cpu": float("inf")},
    )
    store.record_proposals(lease, 0, 0, layout, [new_trial("a")], {})
    store.record_proposals(lease, 1, 1, other, [later], {})
    first, second = store.trials(lease.study_id)
    assert first.configuration == new_trial("a").configuration
    assert (second.configuration, second.costs) == (later.configuration, later.costs)


def test_layout_stored_once(store: Store, layout: Layout, new_trial: NewTrialOf) -> None:
    for name in ("one", "two"):
        lease = store.acquire(store.create_study(name, {}, "hash").id, 60)
        for number in range(2):
            store.record_proposals(lease, 0, number, layout, [new_trial("a")], {})
    count = text("SELECT count(*) FROM layouts")
    assert store.database.read(lambda c: c.execute(count).scalar()) == 1


def test_trials_numbered_over_rounds(
    store: Store, lease: Lease, layout: Layout, new_trial: NewTrialOf, key: KeyOf
) -> None:
    count = 0
    for round, names in [(0, "ab"), (1, "c"), (0, "d")]:
        trials = [new_trial(name) for name in names]
        numbers = store.record_proposals(lease, round, count, layout, trials, {})
        assert numbers == range(count, count := count + len(names))
    stored = [(trial.number, trial.evaluation_key) for trial in store.trials(lease.study_id)]
    assert stored == list(enumerate(map(key, "abcd")))
    assert [trial.number for trial in store.trials(lease.study_id, round=0)] == [0, 1, 3]
    assert store.trial_count(lease.study_id) == 4


def test_trials_numbered_within_study(
    store: Store, lease: Lease, layout: Layout, new_trial: NewTrialOf
) -> None:
    other = store.acquire(store.create_study("other", {}, "hash").id, 60)
    store.record_proposals(lease, 0, 0, layout, [new_trial("a"), new_trial("b")], {})
    assert store.record_proposals(other, 0, 0, layout, [new_trial("a")], {}) == range(1)


@pytest.mark.parametrize("first", [0, 2])
def test_trials_after_others_than_the_stored_refused(
    store: Store, lease: Lease, layout: Layout, new_trial: NewTrialOf, first: int
) -> None:
    store.record_proposals(lease, 0, 0, layout, [new_trial("a")], {})
    late = [new_trial("b"), new_trial("c")]
    with pytest.raises(ApportionError, match="has 1 trials"):
        store.record_proposals(lease, 0, first, layout, late, {"asked": 2})
    assert store.trial_count(lease.study_id) == 1
    assert store.solver_answers(lease.study_id, 0) == {}


def test_answers_add_up_within_their_round(store: Store, lease: Lease, layout: Layout) -> None:
    assert store.solver_answers(lease.study_id, 0) == {}
    store.record_proposals(lease, 0, 0, layout, [], {"ilp 1.0": [1, 2]})
    store.record_proposals(lease, 0, 0, layout, [], {"ilp 0.5": {"infeasible": 0.1}})
    found = store.solver_answers(lease.study_id, 0)
    assert found == {"ilp 1.0": [1, 2], "ilp 0.5": {"infeasible": 0.1}}
    assert store.solver_answers(lease.study_id, 1) == {}


def test_answer_given_once_stays(store: Store, lease: Lease, layout: Layout) -> None:
    for answer in (1, 2):
        store.record_proposals(lease, 0, 0, layout, [], {"ilp": answer})
    assert store.solver_answers(lease.study_id, 0) == {"ilp": 1}


def test_proposals_with_a_bad_trial_store_nothing(
    store: Store, lease: Lease, layout: Layout, new_trial: NewTrialOf
) -> None:
    bad = replace(new_trial("b"), part="test")
    with pytest.raises(ApportionError, match="ck_trials_part"):
        store.record_proposals(lease, 0, 0, layout, [new_trial("a"), bad], {"asked": 2})
    assert store.trials(lease.study_id) == []
    assert store.solver_answers(lease.study_id, 0) == {}


def test_writers_wait_for_each_other(store: Store, layout: Layout, new_trial: NewTrialOf) -> None:
    def drive(name: str) -> list[range]:
        lease = store.acquire(store.create_study(name, {}, "hash").id, 60)
        trials = [new_trial(name)]
        return [store.record_proposals(lease, 0, i, layout, trials, {}) for i in range(20)]

    with ThreadPoolExecutor(4) as pool:
        for numbers in pool.map(drive, "abcd"):
            assert numbers == [range(i, i + 1) for i in range(20)]
