"""SIGKILL leaves all of a transaction or nothing."""

import signal
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from subprocess import Popen

import pytest

from apportion.studies.database import Store

Start = Callable[..., "Popen[str]"]

PROPOSE = """
import os, signal, sys
from sqlalchemy import Engine, event
from apportion.studies.database import NewTrial, Store

moments = int(sys.argv[2])
def live_on(*_):
    global moments
    moments -= 1
    if moments == 0:
        os.kill(os.getpid(), signal.SIGKILL)

trial = NewTrial(configuration={}, first_window=0, windows=1, part="search", origin="x",
                 costs={}, evaluation_key="key")
store = Store.open(sys.argv[1])
lease = store.acquire(1, 60)
event.listen(Engine, "after_cursor_execute", live_on)
event.listen(Engine, "commit", live_on)  # called before the commit
store.record_proposals(lease, 0, [trial, trial], {"asked": 2})
print("stored", flush=True)
live_on()
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


@pytest.mark.parametrize("moment", range(1, 9))
def test_killed_while_proposing(store: Store, path: Path, start: Start, moment: int) -> None:
    study = store.create_study("demo", {}, "hash")
    driver = start(PROPOSE, path, moment)
    told, errors = driver.communicate()
    assert driver.returncode == -signal.SIGKILL, errors
    stored = (len(store.trials(study.id)), store.solver_state(study.id, 0))
    # begin, lease, number, trials, state: update, insert; commit
    assert told == ("stored\n" if moment == 8 else "")
    assert stored == ((2, {"asked": 2}) if moment == 8 else (0, None))


@pytest.mark.parametrize(
    "statement",
    [
        "PRAGMA journal_mode",
        "BEGIN IMMEDIATE",
        "CREATE TABLE apportion_revision",
        "CREATE TABLE trials",
        "CREATE INDEX",
        "INSERT INTO apportion_revision",  # the last one
    ],
)
def test_killed_while_making_tables(path: Path, start: Start, statement: str) -> None:
    driver = start(OPEN, path, statement)
    _, errors = driver.communicate()
    assert driver.returncode == -signal.SIGKILL, errors
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT * FROM sqlite_master").fetchall() == []
    store = Store.open(path)
    store.create_study("demo", {}, "hash")
    store.close()
