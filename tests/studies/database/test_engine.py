"""What goes wrong with a file of SQLite, in one line that names it."""

import os
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from subprocess import Popen

import pytest
from sqlalchemy import event

from apportion.errors import ApportionError, InvalidInput
from apportion.studies.database import Layout, Lease, NewTrial, Store
from apportion.studies.database.engine import at_once

WRITE_AS_NOBODY = """
import os, sys
from apportion.errors import InvalidInput
from apportion.studies.database import Store
if os.geteuid() == 0:  # root may write anything
    os.setgid(65534)
    os.setuid(65534)
try:
    Store.open(sys.argv[1]).create_study("demo", {}, "hash")
except InvalidInput as error:
    print(error)
"""


@pytest.fixture
def address(path: Path) -> str:
    """Of SQLite alone."""
    return str(path)


def set_in_each_connection(store: Store, setting: str) -> None:
    @event.listens_for(store.database.server.engine, "checkout")
    def checkout(connection: sqlite3.Connection, *_: object) -> None:
        connection.execute(f"PRAGMA {setting}").fetchall()


def assert_one_line(
    error: pytest.ExceptionInfo[ApportionError], path: Path, exit_code: int
) -> None:
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)
    assert error.value.exit_code == exit_code


def test_full_disk(
    store: Store,
    lease: Lease,
    path: Path,
    layout: Layout,
    new_trial: Callable[[str], NewTrial],
) -> None:
    set_in_each_connection(store, "max_page_count = 1")  # as many as it has, at the least
    with pytest.raises(ApportionError, match="disk is full") as error:
        store.record_proposals(lease, 0, 0, layout, [new_trial("a")] * 500, {})
    assert_one_line(error, path, 1)
    assert store.trials(lease.study_id) == []


def test_full_disk_freed_again(store: Store, lease: Lease) -> None:
    set_in_each_connection(store, "max_page_count = 1")
    with pytest.raises(ApportionError, match="disk is full"):
        store.record_stage(lease, "score", 0, {"table": "x" * 10**6}, 1.0)
    set_in_each_connection(store, "max_page_count = 10000")
    store.record_stage(lease, "score", 0, {"table": "x" * 10**6}, 1.0)


def test_locked_by_another_process(store: Store, path: Path) -> None:
    set_in_each_connection(store, "busy_timeout = 20")
    store.database.goes_on = at_once
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(ApportionError, match="locked") as error:
            store.create_study("demo", {}, "hash")
    assert_one_line(error, path, 1)
    store.create_study("demo", {}, "hash")


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that any user can reach."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name).resolve()
        os.chmod(name, 0o755)


@pytest.mark.parametrize("folder_mode", [0o777, 0o555], ids=["file", "file and folder"])
def test_read_only(open_folder: Path, start: Callable[..., "Popen[str]"], folder_mode: int) -> None:
    path = open_folder / "studies.db"
    Store.open(path).close()
    path.chmod(0o444)
    open_folder.chmod(folder_mode)
    told, errors = start(WRITE_AS_NOBODY, path).communicate()
    assert told.startswith(str(path)) and "must be writable for you" in told, errors
    assert told.count("\n") == 1


def test_text_file_refused_untouched(path: Path, tmp_path: Path) -> None:
    path.write_text("[study]\nname = 'demo'\n" * 100)
    with pytest.raises(InvalidInput, match="no SQLite database") as error:
        Store.open(path)
    assert_one_line(error, path, 2)
    assert path.read_text() == "[study]\nname = 'demo'\n" * 100
    assert [entry.name for entry in tmp_path.iterdir()] == ["studies.db"]


def test_damaged_file(store: Store, path: Path) -> None:
    for i in range(50):
        store.create_study(f"study-{i}", {"filler": "x" * 1000}, "hash")
    store.close()
    content = bytearray(path.read_bytes())
    content[4096:] = b"\xff" * (len(content) - 4096)  # all pages but the first
    path.write_bytes(content)
    with pytest.raises(ApportionError, match="damaged") as error:
        Store.open(path)
    assert_one_line(error, path, 1)
