"""SIGKILL leaves all of a transaction or nothing."""

import signal
from collections.abc import Callable
from subprocess import Popen

import pytest
from sqlalchemy import create_engine, inspect

from apportion.studies.database import Store

Start = Callable[..., "Popen[str]"]

PROPOSE = """
import os, signal, sys
from sqlalchemy import Engine, event
from apportion.studies.database import Layout, NewTrial, Store

moment = sys.argv[2]
def live_on(connection, cursor, statement, *_):
    if " ".join(statement.split()).startswith(moment):
        os.kill(os.getpid(), signal.SIGKILL)

trial = NewTrial(configuration={}, first_window=0, windows=1, part="search", origin="x",
                 costs={}, evaluation_key="0123456789abcdef" * 2)
store = Store.open(sys.argv[1])
lease = store.acquire(1, 60)
event.listen(Engine, "after_cursor_execute", live_on)
event.listen(Engine, "commit", lambda _: live_on(None, None, "COMMIT"))  # before the commit
store.record_proposals(lease, 0, 0, Layout({}, []), [trial, trial], {"ilp": 2, "greedy": 1})
print("stored", flush=True)
live_on(None, None, "END")
"""
OPEN = """
import os, signal, sys
from sqlalchemy import Engine, event
from apportion.studies.database import Store

def live_on(connection, cursor, statement, *_):
    if " ".join(statement.split()).startswith(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)

event.listen(Engine, "after_cursor_execute", live_on)
Store.open(sys.argv[1])
"""


@pytest.mark.parametrize(
    "moment",
    [
        "SELECT studies.id",  # the lease
        "SELECT max(trials.number)",
        "INSERT INTO layouts",
        "INSERT INTO trials",
        "INSERT INTO solver_answers",
        "COMMIT",
        "END",
    ],
)
def test_killed_while_proposing(store: Store, address: str, start: Start, moment: str) -> None:
    study = store.create_study("demo", {}, "hash")
    driver = start(PROPOSE, address, moment)
    told, errors = driver.communicate()
    assert driver.returncode == -signal.SIGKILL, errors
    stored = store.trial_count(study.id), store.solver_answers(study.id, 0)
    is_stored = moment == "END"
    assert told == ("stored\n" if is_stored else "")
    assert stored == ((2, {"ilp": 2, "greedy": 1}) if is_stored else (0, {}))
    assert store.acquire(study.id, 60).epoch == 2  # its row is free


@pytest.mark.parametrize(
    "statement",
    [
        "CREATE TABLE apportion_revision",
        "CREATE TABLE trials",
        "CREATE INDEX",
        "ALTER TABLE trials RENAME",
        "DROP TABLE solver_states",
        "UPDATE apportion_revision",  # the last one
    ],
)
def test_killed_while_making_tables(address: str, start: Start, statement: str) -> None:
    driver = start(OPEN, address, statement)
    _, errors = driver.communicate()
    assert driver.returncode == -signal.SIGKILL, errors
    engine = create_engine(address if "://" in address else f"sqlite:///{address}")
    assert inspect(engine).get_table_names() == []
    engine.dispose()
    store = Store.open(address)
    store.create_study("demo", {}, "hash")
    store.close()


@pytest.mark.parametrize("address", ["sqlite"], indirect=True)
@pytest.mark.parametrize("statement", ["PRAGMA journal_mode", "BEGIN IMMEDIATE"])
def test_killed_before_making_tables(address: str, start: Start, statement: str) -> None:
    driver = start(OPEN, address, statement)
    _, errors = driver.communicate()
    assert driver.returncode == -signal.SIGKILL, errors
    store = Store.open(address)
    assert store.studies() == []
    store.close()
