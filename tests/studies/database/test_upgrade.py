"""An upgrade is asked for, backed up, made once, and all or nothing."""

import signal
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from subprocess import Popen
from typing import Any

import pytest
from sqlalchemy import create_engine, text

from apportion.errors import ApportionError, InvalidInput
from apportion.studies.database import Store, schema, upgrade

Start = Callable[..., "Popen[str]"]
FIRST, NEWEST = schema.REVISIONS[0], schema.REVISIONS[-1]
of_sqlite = pytest.mark.parametrize("address", ["sqlite"], indirect=True)

UPGRADE = """
import os, signal, sys
import alembic.command, psycopg  # to meet the others in the database, not on the way there
from sqlalchemy import Engine, event
from apportion.studies.database import upgrade

made = 0
def count(connection, cursor, statement, *_):
    global made
    statement = " ".join(statement.split())
    made += statement.startswith("UPDATE apportion_revision")
    if len(sys.argv) > 2 and statement.startswith(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)

def commit(connection):  # called before the commit
    if made and sys.argv[2:] == ["COMMIT"]:
        os.kill(os.getpid(), signal.SIGKILL)

event.listen(Engine, "after_cursor_execute", count)
event.listen(Engine, "commit", commit)
print("ready", flush=True)
sys.stdin.readline()
upgrade(sys.argv[1])
print(made, flush=True)
if sys.argv[2:] == ["END"]:
    os.kill(os.getpid(), signal.SIGKILL)
"""


def revision_at(address: str) -> str:
    """Also where half of an upgrade would show."""
    url = address if "://" in address else f"sqlite:///{address}"
    engine = create_engine(url)
    with engine.connect() as connection:
        trials = connection.execute(text("SELECT count(*) FROM trials")).scalar_one()
        revision = connection.execute(text("SELECT version_num FROM apportion_revision"))
        found = str(revision.scalar_one())
    engine.dispose()
    assert trials == 15
    return found


def execute(address: str, statement: str) -> None:
    engine = create_engine(address if "://" in address else f"sqlite:///{address}")
    with engine.begin() as connection:
        connection.execute(text(statement))
    engine.dispose()


def told_by(process: "Popen[str]") -> str:
    told, errors = process.communicate("go\n")
    assert process.returncode == 0, errors
    return told


@pytest.mark.parametrize("revision", schema.REVISIONS[:-1])
def test_older_database_is_not_opened(address: str, database_of: Any, revision: str) -> None:
    database_of(revision)
    needed = rf"revision {revision}, this one needs {NEWEST}\); .*: apportion db upgrade$"
    with pytest.raises(InvalidInput, match=needed) as error:
        Store.open(address)
    assert "\n" not in str(error.value)
    assert revision_at(address) == revision


@of_sqlite
def test_backup_is_the_database_from_before(address: str, database_of: Any) -> None:
    database_of(FIRST)
    with closing(sqlite3.connect(address)) as connection:
        before = list(connection.iterdump())
    part = Path(f"{address}.{FIRST}.backup.part")
    part.write_text("left by an upgrade that was killed")
    copy = upgrade(address).backup
    assert copy == Path(f"{address}.{FIRST}.backup").resolve()
    assert not part.exists()
    assert revision_at(str(copy)) == FIRST
    with closing(sqlite3.connect(copy)) as connection:
        assert list(connection.iterdump()) == before
    assert upgrade(copy).after == NEWEST


@of_sqlite
def test_no_upgrade_without_a_backup(address: str, database_of: Any) -> None:
    database_of(FIRST)
    Path(f"{address}.{FIRST}.backup").mkdir()
    with pytest.raises(ApportionError, match="the backup cannot be written"):
        upgrade(address)
    assert revision_at(address) == FIRST


def test_newest_database_is_left_alone(address: str, database_of: Any) -> None:
    database_of(NEWEST)
    upgraded = upgrade(address)
    assert (upgraded.before, upgraded.after, upgraded.backup) == (NEWEST, NEWEST, None)


def test_no_upgrade_while_a_study_is_run(address: str, database_of: Any) -> None:
    database_of(FIRST)
    now = "UPDATE studies SET owner = '{{}}', lease_until = {} WHERE id = 2"
    execute(address, now.format("4e9"))
    with pytest.raises(InvalidInput, match=r"study vgg_16\.small is being run; stop it first$"):
        upgrade(address)
    assert revision_at(address) == FIRST
    assert not Path(f"{address}.{FIRST}.backup").exists()
    execute(address, now.format("1e9"))  # its driver is long dead
    assert upgrade(address).after == NEWEST


MOMENTS = [
    "ALTER TABLE studies",
    "CREATE TABLE trials",
    "INSERT INTO trials",
    "INSERT INTO evaluations",
    "INSERT INTO solver_answers",
    "DROP TABLE old_trials",
    "DROP TABLE solver_states",
    "UPDATE apportion_revision",
    "COMMIT",
    "END",
]


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_in_mid_upgrade(address: str, database_of: Any, start: Start, moment: str) -> None:
    database_of(FIRST)
    process = start(UPGRADE, address, moment)
    _, errors = process.communicate("go\n")
    assert process.returncode == -signal.SIGKILL, errors
    assert revision_at(address) == (NEWEST if moment == "END" else FIRST)
    upgrade(address)
    store = Store.open(address)
    assert [store.trial_count(study.id) for study in store.studies()] == [10, 5]
    assert store.check().problems == []
    store.close()


@contextmanager
def all_wait(
    address: str, count: int, until: Callable[[Callable[[], object]], None]
) -> Iterator[None]:
    """On a server none of those that begin in the body changes a table before all want to."""
    if "://" not in address:
        yield
        return
    waiting = text("SELECT count(DISTINCT pid) FROM pg_locks WHERE NOT granted")
    engine = create_engine(address)
    with engine.begin() as connection:
        connection.execute(text("LOCK TABLE studies IN SHARE MODE"))
        yield
        until(lambda: connection.execute(waiting).scalar_one() == count)
    engine.dispose()


def test_eight_at_once_make_one_upgrade(
    address: str,
    database_of: Any,
    start: Start,
    until: Callable[[Callable[[], object]], None],
) -> None:
    database_of(FIRST)
    processes = [start(UPGRADE, address) for _ in range(8)]
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    with all_wait(address, len(processes), until):
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
    assert sorted(map(told_by, processes)) == ["0\n"] * 7 + ["1\n"]
    assert revision_at(address) == NEWEST


def test_leases_go_on_where_they_were(address: str, database_of: Any) -> None:
    database_of(FIRST)
    upgrade(address)
    store = Store.open(address)
    lease = store.acquire(1, 60)
    store.renew(replace(lease, seconds=30))
    store.close()
    assert lease.epoch == 2
