"""What is removed goes for good, what another study needs stays, and damage is found."""

import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from apportion.hashing import content_hash
from apportion.studies.database import Evaluation, Layout, Lease, NewTrial, Store
from apportion.studies.database.owners import Owner
from apportion.studies.database.upkeep import InUse, Rows, may_write

DONE = Evaluation(np.array([0.5, 0.25]), np.array([1.0, 2.0]), None, 0.1)
OURS, SHARED, USED, NOBODYS = "ours", "shared", "used", "nobody's"
Fill = Callable[[Store, Lease, list[str]], None]


@pytest.fixture
def other(store: Store) -> Lease:
    return store.acquire(store.create_study("other", {}, "hash").id, 60)


@pytest.fixture
def file_store(path: Path) -> Iterator[Store]:
    """In a file that a test may damage."""
    store = Store.open(path)
    yield store
    store.close()


@pytest.fixture
def fill(layout: Layout, new_trial: Callable[[str], NewTrial]) -> Fill:
    """fill(store, lease, names): a trial and a result for each."""

    def run(store: Store, lease: Lease, names: list[str]) -> None:
        trials = [new_trial(name) for name in names]
        store.record_proposals(lease, 0, 0, layout, trials, {})
        for trial in trials:
            store.record_evaluation(lease, trial.evaluation_key, DONE)

    return run


def evaluated(store: Store) -> set[str]:
    """Those of the names whose results are stored."""
    names = {content_hash(name): name for name in (OURS, SHARED, USED, NOBODYS)}
    return {names[key] for key in store.evaluations(names)}


def leased(store: Store) -> Lease:
    return store.acquire(store.create_study("demo", {}, "hash").id, 60)


def test_delete_keeps_what_another_study_names(
    store: Store, lease: Lease, other: Lease, fill: Fill
) -> None:
    fill(store, lease, [OURS, SHARED, USED])
    fill(store, other, [SHARED])
    store.use_evaluations(other, [content_hash(USED)])
    store.release(lease)
    foreseen = store.deletable(lease.study_id)
    removed = store.delete_study(lease.study_id)
    assert removed == foreseen
    assert {kind: rows.count for kind, rows in removed.items()} == {
        "study": 1,
        "trials": 3,
        "evaluations": 1,
        "layouts": 0,
    }
    assert (store.find_study("demo"), evaluated(store)) == (None, {SHARED, USED})
    assert [t.evaluation_key for t in store.trials(other.study_id)] == [content_hash(SHARED)]


def test_delete_leaves_no_row_of_the_study(path: Path, file_store: Store, fill: Fill) -> None:
    store, lease = file_store, leased(file_store)
    fill(store, lease, [OURS])
    store.use_evaluations(lease, [content_hash(USED)])
    store.record_stage(lease, "compress", 0, {"index": {}}, 1.0)
    store.record_change(lease, 1, {"tokens": 5})
    store.record_bill(lease, {"done": (1, 0.1)})
    store.record_evaluation(
        lease, content_hash(NOBODYS), Evaluation(None, None, "slow", 9.0, "timeout")
    )
    store.release(lease)
    store.delete_study(lease.study_id)
    with sqlite3.connect(path) as connection:
        tables = [row[0] for row in connection.execute("SELECT name FROM sqlite_schema")]
        counts = {
            name: connection.execute(f"SELECT count(*) FROM {name}").fetchone()[0]
            for name in tables
            if not name.startswith(("ix_", "uq_", "sqlite_", "apportion_"))
        }
    assert len(counts) >= 10 and set(counts.values()) == {0}


def test_running_study_is_not_deleted(store: Store, lease: Lease, fill: Fill) -> None:
    fill(store, lease, [OURS])
    for attempt in (store.deletable, store.delete_study):
        with pytest.raises(InUse, match='"demo" is being run by pid'):
            attempt(lease.study_id)
    assert store.trial_count(lease.study_id) == 1


def test_study_whose_driver_only_sleeps_is_not_deleted(store: Store) -> None:
    study = store.create_study("demo", {}, "hash")
    store.acquire(study.id, -1.0)
    (asleep,) = store.studies()
    assert not asleep.is_owned and may_write(asleep)
    with pytest.raises(InUse):
        store.delete_study(study.id)


@pytest.mark.parametrize(("lease_left", "expected"), [(5.0, True), (-5.0, False)])
def test_lease_of_another_host_stands_until_it_expires(
    store: Store, lease_left: float, expected: bool
) -> None:
    study = store.create_study("demo", {}, "hash")
    elsewhere = replace(study, owner=Owner("elsewhere.invalid", 1, 0.0), lease_left=lease_left)
    assert may_write(elsewhere) is expected


def test_garbage_is_what_nobody_names(store: Store, lease: Lease, other: Lease, fill: Fill) -> None:
    fill(store, lease, [OURS])
    store.use_evaluations(lease, [content_hash(USED)])
    store.record_evaluation(lease, content_hash(USED), DONE)
    store.record_evaluation(lease, content_hash(NOBODYS), DONE)
    foreseen = store.garbage()
    assert foreseen["evaluations"].count == 1 and foreseen["evaluations"].bytes > 16
    assert store.remove_garbage() == foreseen
    assert evaluated(store) == {OURS, USED}
    assert store.garbage() == {"evaluations": Rows(0, 0), "layouts": Rows(0, 0)}


def test_layout_goes_with_the_last_trial_that_needs_it(
    store: Store, lease: Lease, fill: Fill
) -> None:
    fill(store, lease, [OURS])
    store.release(lease)
    assert store.delete_study(lease.study_id)["layouts"].count == 1


def test_idle_only_where_nobody_runs_a_study(store: Store, lease: Lease) -> None:
    with pytest.raises(InUse, match="demo"):
        store.while_idle(lambda: None)
    store.release(lease)
    assert store.while_idle(lambda: [study.name for study in store.studies()]) == ["demo"]


def test_nobody_begins_to_run_a_study_while_idle(
    address: str, store: Store, start: Callable[..., subprocess.Popen[str]]
) -> None:
    study = store.create_study("demo", {}, "hash")
    code = """
import sys, time
from apportion.studies.database import Store
store = Store.open(sys.argv[1])
print("open", flush=True)
store.acquire(int(sys.argv[2]), 60)
print(time.time(), flush=True)
"""
    process = start(code, address, study.id)
    assert process.stdout is not None
    lines = iter(process.stdout.readline, "")
    ended = []

    def work() -> None:
        assert next(lines) == "open\n"
        time.sleep(0.5)
        ended.append(time.time())

    store.while_idle(work)
    assert float(next(lines)) >= ended[0]


def test_compacted_file_is_shorter(path: Path, file_store: Store) -> None:
    store, lease = file_store, leased(file_store)
    values = np.random.default_rng(0).random(100_000)
    store.record_evaluation(lease, content_hash(NOBODYS), Evaluation(values, values, None, 0.1))
    store.remove_garbage()
    with pytest.raises(InUse):
        store.compact()
    store.release(lease)
    shorter = store.compact()
    assert shorter is not None and shorter > 1_000_000
    assert path.stat().st_size < 800_000


def test_whole_database_has_no_problem(
    store: Store, lease: Lease, other: Lease, fill: Fill
) -> None:
    fill(store, lease, [OURS, SHARED])
    store.record_evaluation(
        lease, content_hash(USED), Evaluation(None, None, "raised", 0.1, "raised")
    )
    store.record_stage(lease, "search", 0, {"candidates": []}, 1.0)
    found = store.check()
    assert (found.studies, found.trials, found.evaluations, found.problems) == (2, 2, 3, [])


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        ("UPDATE stage_outputs SET output = '{'", "stage_outputs (study demo, stage search, ro"),
        ("UPDATE trials SET configuration = x'03'", "trials (study demo, number 0): cannot be"),
        ("UPDATE trials SET costs = x'0100'", "trials (study demo, number 0): cannot be read"),
        ("UPDATE layouts SET layout = '[]'", "layouts (id 1): cannot be read"),
        (
            "UPDATE evaluations SET losses = x'02ffff'",
            f"evaluations (key {content_hash(OURS)}): cannot",
        ),
        ("UPDATE evaluations SET weights = null", "has not as many weights as losses"),
        ("UPDATE evaluations SET losses = null", "is neither a result nor a failure"),
        ("UPDATE studies SET specification = ''", "studies (demo): cannot be read"),
        ("DELETE FROM layouts", "a row of trials refers to no row of layouts"),
        ("DELETE FROM layouts", "its layout is missing or damaged"),
    ],
)
def test_damaged_row_is_named(
    path: Path, file_store: Store, fill: Fill, damage: str, line: str
) -> None:
    store, lease = file_store, leased(file_store)
    fill(store, lease, [OURS])
    store.record_stage(lease, "search", 0, {"candidates": []}, 1.0)
    with sqlite3.connect(path) as connection:
        assert connection.execute(damage).rowcount == 1
    assert any(line in problem for problem in store.check().problems)


def test_damaged_page_is_a_problem_not_a_crash(path: Path, file_store: Store, fill: Fill) -> None:
    store, lease = file_store, leased(file_store)
    fill(store, lease, [str(number) for number in range(2000)])
    store.release(lease)
    store.compact()
    store.close()
    content = bytearray(path.read_bytes())
    middle = len(content) // 2 // 4096 * 4096
    content[middle : middle + 4 * 4096] = b"\xff" * (4 * 4096)
    path.write_bytes(content)
    opened = Store.open(path)
    try:
        assert opened.check().problems
    finally:
        opened.close()
