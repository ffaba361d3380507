"""How the database is spoken to: settings, transactions, errors in the user's words.

SQLite is set up to lose nothing that was committed (WAL, full synchronization) and to let several
processes write in turn: a writing transaction takes the write lock at its beginning, since one
that reads first and writes later fails at once where another wrote in between.
"""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import URL, Connection, Engine, create_engine, event
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.pool import ConnectionPoolEntry

from apportion.errors import ApportionError, InvalidInput

BUSY_SECONDS = 30
JOURNAL_BYTES = 64 * 2**20
SETTINGS = (
    f"busy_timeout = {BUSY_SECONDS * 1000}",
    "synchronous = FULL",
    "foreign_keys = ON",
    f"journal_size_limit = {JOURNAL_BYTES}",
)
BEGIN = "apportion_begin"


class Database:
    """One SQLite file and its connections; may be used by several threads, not across a fork."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.engine = _make_engine(path)

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A transaction that sees one state of the database, whatever others write meanwhile."""
        with self._transaction("BEGIN") as connection:
            yield connection

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """A transaction that writes all of its block, or nothing where the block raises."""
        with self._transaction("BEGIN IMMEDIATE") as connection:
            yield connection

    def write_ahead(self) -> None:
        """Gives the file a write-ahead log, for good; nobody may open it while it gets one."""
        with self._transaction("") as connection:
            connection.exec_driver_sql("PRAGMA journal_mode = WAL")

    def close(self) -> None:
        """Closes all connections."""
        self.engine.dispose()

    @contextmanager
    def _transaction(self, begin: str) -> Iterator[Connection]:
        try:
            with self.engine.connect().execution_options(**{BEGIN: begin}) as connection:
                with connection.begin():
                    yield connection
        except SQLAlchemyError as error:
            raise translated(error, self.path) from error


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
        if statement := connection.get_execution_options()[BEGIN]:
            connection.exec_driver_sql(statement)

    return engine


def translated(error: SQLAlchemyError, path: Path) -> ApportionError:
    """`error` in one line that names the file and, where there is something, what to do."""
    cause = error.orig if isinstance(error, DBAPIError) else error
    said = " ".join(str(cause).split())
    # the low byte is the primary code, the rest says more closely where it happened
    match getattr(cause, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF:
        case sqlite3.SQLITE_FULL:
            return ApportionError(f"{path}: the disk is full; free some space, then resume")
        case sqlite3.SQLITE_BUSY | sqlite3.SQLITE_LOCKED:
            return ApportionError(
                f"{path}: another process has kept it locked for {BUSY_SECONDS} s; try again"
            )
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
