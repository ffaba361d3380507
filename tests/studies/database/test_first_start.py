"""Opening makes the tables once, however many do it, and refuses what it does not know."""

import sqlite3
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from subprocess import Popen
from typing import Any

import pytest
from sqlalchemy import make_url, text

from apportion.errors import InvalidInput
from apportion.studies.database import Store, schema, upgrade

Start = Callable[..., "Popen[str]"]
of_sqlite = pytest.mark.parametrize("address", ["sqlite"], indirect=True)

OPEN = """
import sys
from sqlalchemy import Engine, event
from apportion.studies.database import Store

made = 0
def count(connection, cursor, statement, *_):
    global made
    made += " ".join(statement.split()).startswith("CREATE TABLE studies")

event.listen(Engine, "after_cursor_execute", count)
if "prepared" in sys.argv:  # to meet the others in the database, not on the way there
    import alembic.command, psycopg
print("ready", flush=True)
sys.stdin.readline()
store = Store.open(sys.argv[1])
store.create_study(sys.argv[2], {}, "hash")
store.close()
print(made, "alembic" in sys.modules, flush=True)
"""


def test_eight_at_once_make_one_migration(address: str, start: Start, tmp_path: Path) -> None:
    processes = [start(OPEN, address, f"study-{i}", "prepared") for i in range(8)]
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    ended = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0] * 8, ended
    assert sorted(told[0] for told, _ in ended) == ["0"] * 7 + ["1"]
    store = Store.open(address)
    assert {study.name for study in store.studies()} == {f"study-{i}" for i in range(8)}
    store.close()
    # When the last two close at once, SQLite leaves its own write-ahead files; ours must be gone.
    left = {entry.name for entry in tmp_path.iterdir()} - {"studies.db-wal", "studies.db-shm"}
    assert left <= {"studies.db"}


def test_alembic_imported_only_where_needed(store: Store, address: str, start: Start) -> None:
    told, errors = start(OPEN, address, "demo").communicate("go\n")
    assert told == "ready\n0 False\n", errors


def test_import_needs_no_alembic(start: Start) -> None:
    code = "import sys, apportion.studies.database as d; print('alembic' in sys.modules)"
    assert start(code).communicate()[0] == "False\n"
    assert sys.modules["apportion.studies.database"]


@pytest.fixture
def seen(request: pytest.FixtureRequest, address: str) -> Callable[[], object]:
    """seen(): all of a database that somebody outside of it can see."""

    def dump() -> object:
        if "://" not in address:
            folder = Path(address).parent
            return {entry.name: entry.read_bytes() for entry in folder.iterdir()}
        server = request.getfixturevalue("postgresql")
        lines = server.dump(make_url(address).database).splitlines()
        return [line for line in lines if not line.startswith("\\")]  # a new secret each time

    return dump


@pytest.mark.parametrize("open_it", [Store.open, upgrade], ids=["open", "upgrade"])
def test_newer_database_refused_untouched(
    store: Store, address: str, seen: Callable[[], object], open_it: Callable[[str], object]
) -> None:
    newer = text(f"UPDATE {schema.VERSION_TABLE} SET version_num = '0417'")
    store.database.write(lambda connection: connection.execute(newer))
    store.close()
    before = seen()
    needed = f"needs an apportion that knows revision 0417; .*up to {schema.REVISIONS[-1]}: upgrade"
    with pytest.raises(InvalidInput, match=needed) as error:
        open_it(address)
    assert "\n" not in str(error.value)
    assert seen() == before


@pytest.mark.parametrize("open_it", [Store.open, upgrade], ids=["open", "upgrade"])
def test_database_of_another_program_refused_untouched(
    request: pytest.FixtureRequest,
    address: str,
    seen: Callable[[], object],
    open_it: Callable[[str], object],
) -> None:
    table = "CREATE TABLE trials (trial_id INTEGER)"
    if "://" in address:
        request.getfixturevalue("postgresql").sql(table, make_url(address).database)
    else:
        with closing(sqlite3.connect(address)) as connection, connection:
            connection.execute(table)
    before = seen()
    with pytest.raises(InvalidInput, match="another program"):
        open_it(address)
    assert seen() == before


def test_server_database_may_hold_other_tables(postgresql: Any, postgresql_address: str) -> None:
    database = make_url(postgresql_address).database
    postgresql.sql("CREATE TABLE customers (name TEXT)", database)
    Store.open(postgresql_address).close()
    assert postgresql.sql("SELECT count(*) FROM customers", database) == "0\n"


@of_sqlite
def test_settings_lose_nothing(store: Store) -> None:
    names = ("journal_mode", "synchronous", "busy_timeout", "foreign_keys")
    found = store.database.read(
        lambda c: [c.exec_driver_sql(f"PRAGMA {name}").scalar() for name in names]
    )
    full = 2
    assert found == ["wal", full, 30_000, 1]


@of_sqlite
def test_lock_file_left_by_a_killed_process(address: str, tmp_path: Path) -> None:
    (tmp_path / "studies.db.lock").touch()
    Store.open(address).close()
    assert [entry.name for entry in tmp_path.iterdir()] == ["studies.db"]
