"""SQLite, set up to lose nothing that was committed and to let several processes write in turn.

Write-ahead log and full synchronization; a writing transaction takes the write lock at its
beginning, since one that reads first and writes later fails at once where another wrote between.
"""

import fcntl
import os
import random
import sqlite3
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from sqlalchemy import URL, Connection, Engine, create_engine, event
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import DBAPIError, OperationalError, SQLAlchemyError
from sqlalchemy.pool import ConnectionPoolEntry

from apportion.errors import ApportionError, InvalidInput
from apportion.studies.database.engine import Database, DatabaseAway, Trouble

BUSY_SECONDS = 30
ASK_SECONDS = 0.002, 0.006
JOURNAL_BYTES = 64 * 2**20
SETTINGS = (
    f"busy_timeout = {BUSY_SECONDS * 1000}",
    "synchronous = FULL",
    "foreign_keys = ON",
    f"journal_size_limit = {JOURNAL_BYTES}",
)
BEGIN = "apportion_begin"


class SQLite:
    """A database in one file; see `Server`."""

    reading: dict[str, object] = {BEGIN: "BEGIN"}
    writing: dict[str, object] = {BEGIN: "BEGIN IMMEDIATE"}

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = str(path)
        self.engine = _make_engine(path)

    def starting(self) -> AbstractContextManager[None]:
        """A lock file beside the database, there only while somebody holds it."""
        return _exclusive(self.path.with_name(self.path.name + ".lock"))

    def before_tables(self, database: Database) -> None:
        """Give the file a write-ahead log; nobody may open it while it gets one."""
        outside: dict[str, object] = {BEGIN: ""}

        def write_ahead(connection: Connection) -> None:
            connection.exec_driver_sql("PRAGMA journal_mode = WAL")

        database._transact(write_ahead, outside, database.goes_on)

    def lock_for_migration(self, connection: Connection) -> None:
        """Nothing: the transaction has locked the file."""

    def backup(self, revision: str) -> Path:
        """A copy beside the file, whole and synchronized. Raises ApportionError."""
        copy = self.path.with_name(f"{self.path.name}.{revision}.backup")
        part = copy.with_name(copy.name + ".part")
        try:
            part.unlink(missing_ok=True)
            source, target = sqlite3.connect(self.path), sqlite3.connect(part)
            try:
                source.backup(target)
            finally:
                target.close()
                source.close()
            part.replace(copy)
        except (OSError, sqlite3.Error) as error:
            raise ApportionError(f"{copy}: the backup cannot be written: {error}") from error
        return copy

    def problems(self, connection: Connection) -> list[str]:
        """What SQLite finds damaged, and rows that refer to none."""
        found = [row[0] for row in connection.exec_driver_sql("PRAGMA integrity_check")]
        orphans = connection.exec_driver_sql("PRAGMA foreign_key_check").all()
        lost = [f"a row of {row[0]} refers to no row of {row[2]}" for row in orphans]
        return [line for line in found if line != "ok"] + lost

    def trouble(self, error: SQLAlchemyError) -> Trouble:
        """See `Server`."""
        cause = error.orig if isinstance(error, DBAPIError) else error
        code = _code(error)
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            waited = f"another process has kept it locked for more than {BUSY_SECONDS} s"
            return Trouble("away", DatabaseAway(f"{self.path}: {waited}; try again"))
        return Trouble("final", _told(code, " ".join(str(cause).split()), self.path))


def _told(code: int, said: str, path: Path) -> ApportionError:
    match code:
        case sqlite3.SQLITE_FULL:
            return ApportionError(f"{path}: the disk is full; free some space, then resume")
        case sqlite3.SQLITE_READONLY:
            return InvalidInput(
                f"{path}: cannot be written; its file and folder must be writable for you"
            )
        case sqlite3.SQLITE_CANTOPEN | sqlite3.SQLITE_PERM:
            return InvalidInput(
                f"{path}: cannot be opened; its file and folder must be writable for you"
            )
        case sqlite3.SQLITE_NOTADB:
            return InvalidInput(f"{path}: is no SQLite database; name another file")
        case sqlite3.SQLITE_CORRUPT:
            return ApportionError(f"{path}: is damaged ({said}); restore a copy of it")
        case sqlite3.SQLITE_IOERR:
            return ApportionError(f"{path}: the disk failed ({said})")
        case _:
            return ApportionError(f"{path}: {said}")


def _make_engine(path: Path) -> Engine:
    # without isolation level the driver begins nothing by itself
    engine = create_engine(
        URL.create("sqlite", database=str(path)), connect_args={"isolation_level": None}
    )

    @event.listens_for(engine, "connect")
    def settings(connection: DBAPIConnection, entry: ConnectionPoolEntry) -> None:
        cursor = connection.cursor()
        for setting in SETTINGS:
            cursor.execute(f"PRAGMA {setting}")
        cursor.close()

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        statement = connection.get_execution_options()[BEGIN]
        if statement == SQLite.writing[BEGIN]:
            _take_turn(connection)
        elif statement:
            connection.exec_driver_sql(statement)

    return engine


def _take_turn(connection: Connection) -> None:
    """Begin to write as soon as nobody else does.

    SQLite itself asks ever less often the longer it has waited, so that those who come later go
    first: among 16 processes one waits for many seconds. Here all ask equally often.
    """
    (patience,) = connection.exec_driver_sql("PRAGMA busy_timeout").one()
    deadline = time.monotonic() + patience / 1000
    connection.exec_driver_sql("PRAGMA busy_timeout = 0")
    try:
        while True:
            try:
                connection.exec_driver_sql(str(SQLite.writing[BEGIN]))
                return
            except OperationalError as error:
                if _code(error) != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                    raise
            time.sleep(random.uniform(*ASK_SECONDS))
    finally:
        connection.exec_driver_sql(f"PRAGMA busy_timeout = {patience}")


def _code(error: SQLAlchemyError) -> int:
    cause = error.orig if isinstance(error, DBAPIError) else error
    # the low byte is the primary code, the rest says more closely where it happened
    return getattr(cause, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF


@contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    while True:
        try:
            file = path.open("a")
        except OSError as error:
            raise InvalidInput(
                f"{path}: cannot be made ({error.strerror}); the folder must be writable for you"
            ) from error
        with file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not _is_at(file.fileno(), path):
                continue  # the one who held it has removed it: others lock a newer file
            try:
                yield
            finally:
                path.unlink()
            return


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
