"""Opening makes the tables once, and refuses what it does not know."""

import sqlite3
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from subprocess import Popen

import pytest
from sqlalchemy import create_engine

from apportion.errors import InvalidInput
from apportion.studies.database import Store, schema, tables

Start = Callable[..., "Popen[str]"]

OPEN = """
import sys
from apportion.studies.database import Store
print("ready", flush=True)
sys.stdin.readline()
store = Store.open(sys.argv[1])
store.create_study(sys.argv[2], {}, "hash")
print("alembic" in sys.modules, flush=True)
"""


def statements(path: Path) -> set[str]:
    with closing(sqlite3.connect(path)) as connection:
        rows = connection.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL")
        return {" ".join(sql.split()) for (sql,) in rows if schema.VERSION_TABLE not in sql}


def test_migrations_make_the_tables_of_today(store: Store, path: Path, tmp_path: Path) -> None:
    engine = create_engine(f"sqlite:///{tmp_path / 'direct.db'}")
    tables.metadata.create_all(engine)
    engine.dispose()
    assert statements(path) == statements(tmp_path / "direct.db")


def test_revisions_are_a_line_that_ends_with_the_newest() -> None:
    from alembic.config import Config
    from alembic.script import ScriptDirectory

    config = Config()
    config.set_main_option("script_location", "apportion.studies.database:migrations")
    line = [script.revision for script in ScriptDirectory.from_config(config).walk_revisions()]
    assert tuple(reversed(line)) == schema.REVISIONS


def test_first_start_of_eight_makes_one_migration(path: Path, start: Start, tmp_path: Path) -> None:
    processes = [start(OPEN, path, f"study-{i}") for i in range(8)]
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    ended = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0] * 8, ended
    assert sorted(told for told, _ in ended) == ["False\n"] * 7 + ["True\n"]
    # When the last two close at once, SQLite leaves its own write-ahead files; ours must be gone.
    left = {entry.name for entry in tmp_path.iterdir()} - {"studies.db-wal", "studies.db-shm"}
    assert left == {"studies.db"}


def test_alembic_imported_only_where_needed(store: Store, path: Path, start: Start) -> None:
    told, errors = start(OPEN, path, "demo").communicate("go\n")
    assert told == "ready\nFalse\n", errors


def test_newer_database_refused(store: Store, path: Path) -> None:
    store.close()
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(f"UPDATE {schema.VERSION_TABLE} SET version_num = '0417'")
    with pytest.raises(InvalidInput, match=r"studies\.db: needs an apportion .* revision 0417"):
        Store.open(path)


def test_database_of_another_program_refused_untouched(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("CREATE TABLE trials (trial_id INTEGER)")
    before = path.read_bytes()
    with pytest.raises(InvalidInput, match="another program"):
        Store.open(path)
    assert path.read_bytes() == before


def test_settings_lose_nothing(store: Store) -> None:
    names = ("journal_mode", "synchronous", "busy_timeout", "foreign_keys")
    with store._database.reading() as connection:
        found = [connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in names]
    full = 2
    assert found == ["wal", full, 30_000, 1]


def test_lock_file_left_by_a_killed_process(path: Path, tmp_path: Path) -> None:
    (tmp_path / "studies.db.lock").touch()
    Store.open(path).close()
    assert [entry.name for entry in tmp_path.iterdir()] == ["studies.db"]


def test_import_needs_no_alembic(start: Start) -> None:
    code = "import sys, apportion.studies.database as d; print('alembic' in sys.modules)"
    assert start(code).communicate()[0] == "False\n"
    assert sys.modules["apportion.studies.database"]
