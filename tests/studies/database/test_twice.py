"""Whatever is written may be written twice: a connection can be lost at the very commit."""

import logging
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy import Connection

from apportion.studies.database import Evaluation, Layout, Lease, NewTrial, Store, tables

NewTrialOf = Callable[[str], NewTrial]
Write = Callable[[Store, Lease, NewTrial], Any]

LAYOUT = Layout({"b.site": ["dense", "w4g64"], "a.site": ["dense"]}, ["bytes"])
DONE = Evaluation(np.array([0.1, 2.0]), np.ones(2), None, 1.5)
LOST = Evaluation(None, None, "a worker died", 0.5, "died")
WRITES: dict[str, Write] = {
    "create": lambda s, lease, trial: s.create_study("other", {"a": 1}, "hash"),
    "acquire": lambda s, lease, trial: s.acquire(lease.study_id, 60),
    "take over": lambda s, lease, trial: s.acquire(lease.study_id, 60, take_over=True),
    "renew": lambda s, lease, trial: s.renew(lease),
    "release": lambda s, lease, trial: s.release(lease),
    "ask to stop": lambda s, lease, trial: s.ask_to_stop(lease.study_id, "now"),
    "state": lambda s, lease, trial: s.set_state(lease, "done", "export", "fine"),
    "stage": lambda s, lease, trial: s.record_stage(lease, "search", 0, {"a": [0.1]}, 1.0),
    "change": lambda s, lease, trial: s.record_change(lease, 0, {"tokens": 8}),
    "proposals": lambda s, lease, trial: s.record_proposals(
        lease, 0, 0, LAYOUT, [trial, trial], {"ilp": [1]}
    ),
    "answers": lambda s, lease, trial: s.record_proposals(lease, 0, 0, LAYOUT, [], {"ilp": [1]}),
    "evaluation": lambda s, lease, trial: s.record_evaluation(lease, trial.evaluation_key, DONE),
    "failure": lambda s, lease, trial: s.record_evaluation(lease, trial.evaluation_key, LOST),
    "uses": lambda s, lease, trial: s.use_evaluations(lease, [trial.evaluation_key]),
    "bill": lambda s, lease, trial: s.record_bill(lease, {"done": (3, 1.5)}),
    "measurements": lambda s, lease, trial: s.record_measurements("box", {"a": {"ms": 1.5}}),
    "forget": lambda s, lease, trial: s.forget(lease),
    "delete": lambda s, lease, trial: s.delete_study(lease.study_id) and None,
    "garbage": lambda s, lease, trial: s.remove_garbage() and None,
}
OF_A_FREE_STUDY = ("acquire", "delete")
ONLY_ONCE = ("create", "acquire", "take over")  # a second call is another wish
OF_THE_MOMENT = ("created_at", "lease_until", "token", "id", "layout_id")  # ids may leave gaps


def contents(store: Store) -> dict[str, list[str]]:
    """All rows of all tables, but for clocks and random numbers."""

    def work(connection: Connection) -> dict[str, list[str]]:
        found = {}
        for table in tables.metadata.sorted_tables:
            rows = [dict(row) for row in connection.execute(table.select()).mappings()]
            kept = [{k: v for k, v in row.items() if k not in OF_THE_MOMENT} for row in rows]
            found[table.name] = sorted(str(row) for row in kept)
        return found

    return store.database.read(work)


def result_of(value: Any) -> Any:
    return getattr(value, "epoch", value)  # of leases and studies: all else is of the moment


@pytest.fixture
def untroubled(tmp_path: Path) -> Iterator[tuple[Store, Lease]]:
    """Another store, in which everything goes well: what is to be expected."""
    store = Store.open(tmp_path / "untroubled.db")
    yield store, store.acquire(store.create_study("demo", {}, "hash").id, 60)
    store.close()


@pytest.fixture
def cut(request: pytest.FixtureRequest, store: Store) -> Callable[[Any], None]:
    """cut(connection): fail as the driver does where the connection is lost."""

    def locked(connection: sqlite3.Connection) -> None:
        # SQLite has no connection to lose; this is what it answers when it is to be tried again
        error = sqlite3.OperationalError("database is locked")
        error.sqlite_errorcode = sqlite3.SQLITE_BUSY
        raise error

    def terminated(connection: Any) -> None:
        server = request.getfixturevalue("postgresql")
        server.sql(f"SELECT pg_terminate_backend({connection.dbapi_connection.info.backend_pid})")
        while True:  # until the backend has seen it
            connection.dbapi_connection.execute("SELECT 1")

    return locked if store.database.server.engine.dialect.name == "sqlite" else terminated


def lose_commit(store: Store, cut: Callable[[Any], None], is_done: bool) -> list[bool]:
    """Cut the connection at the next commit, after or before it is done; filled once it is."""
    dialect = store.database.server.engine.dialect
    commit, lost = dialect.do_commit, []

    def lose(connection: Any) -> None:
        dialect.do_commit = commit
        lost.append(True)
        if is_done:
            commit(connection)
        cut(connection)

    dialect.do_commit = lose
    return lost


@pytest.mark.parametrize("is_done", [True, False], ids=["committed", "not committed"])
@pytest.mark.parametrize("name", WRITES)
def test_connection_lost_at_the_commit(
    store: Store,
    lease: Lease,
    untroubled: tuple[Store, Lease],
    new_trial: NewTrialOf,
    cut: Callable[[Any], None],
    caplog: pytest.LogCaptureFixture,
    name: str,
    is_done: bool,
) -> None:
    if name in OF_A_FREE_STUDY:
        store.release(lease)
        untroubled[0].release(untroubled[1])
    lost = lose_commit(store, cut, is_done)
    with caplog.at_level(logging.WARNING):
        given = WRITES[name](store, lease, new_trial("a"))
    assert lost
    assert result_of(given) == result_of(WRITES[name](*untroubled, new_trial("a")))
    assert contents(store) == contents(untroubled[0])
    assert caplog.records == []  # SQLAlchemy would tell the user of the lost connection


@pytest.mark.parametrize("name", [name for name in WRITES if name not in ONLY_ONCE])
def test_done_twice(store: Store, lease: Lease, new_trial: NewTrialOf, name: str) -> None:
    if name in OF_A_FREE_STUDY:
        store.release(lease)
    given = WRITES[name](store, lease, new_trial("a"))
    once = contents(store)
    assert WRITES[name](store, lease, new_trial("a")) == given
    assert contents(store) == once


def test_lease_acquired_at_a_lost_commit_is_good(store: Store, cut: Callable[[Any], None]) -> None:
    study = store.create_study("demo", {}, "hash")
    lose_commit(store, cut, is_done=True)
    lease = store.acquire(study.id, 60)
    store.set_state(lease, "running", "search", "")
    assert (store.studies()[0].state, lease.epoch) == ("running", 1)


def test_every_writing_method_is_here() -> None:
    reads = "bill changes evaluations find_study measurements solver_answers stage_output".split()
    reads += "stage_rounds stage_seconds stop_asked studies trial_count trials".split()
    reads += "check compact deletable garbage while_idle".split()
    writes = "acquire ask_to_stop create_study delete_study forget record_bill".split()
    writes += (
        "record_change record_evaluation record_evaluations record_measurements "
        "record_proposals record_stage"
    ).split()
    writes += "release remove_garbage renew set_state use_evaluations".split()
    methods = {name for name in dir(Store) if not name.startswith("_")}
    assert methods - {*reads, "open", "close", "database"} == set(writes)
