"""Brings a database to the tables of this version, once, however many processes open it."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import Connection, inspect, text

from apportion.errors import InvalidInput
from apportion.studies.database.engine import Database

REVISIONS = ("0001",)  # all of migrations/versions/, the newest last
VERSION_TABLE = "apportion_revision"


def prepare(database: Database) -> None:
    """Makes or upgrades the tables where needed; all of that is one transaction.

    Raises InvalidInput where the file belongs to a newer version or to another program.
    """
    with exclusive(database.path.with_name(database.path.name + ".lock")):
        with database.reading() as connection:
            revision = _revision(connection, database.path)
        database.write_ahead()
        if revision != REVISIONS[-1]:
            with database.writing() as connection:
                _upgrade(connection)


def _revision(connection: Connection, path: Path) -> str | None:
    """The revision of the tables; None for an empty database."""
    tables = inspect(connection).get_table_names()
    if not tables:
        return None
    if VERSION_TABLE not in tables:
        raise InvalidInput(f"{path}: is the database of another program; name another file")
    query = text(f"SELECT version_num FROM {VERSION_TABLE}")
    revision = str(connection.execute(query).scalar_one())
    if revision not in REVISIONS:
        raise InvalidInput(
            f"{path}: needs an apportion that knows revision {revision};"
            f" this one knows up to {REVISIONS[-1]}: upgrade apportion, or name another file"
        )
    return revision


def _upgrade(connection: Connection) -> None:
    # imported here: most runs find a database that needs nothing
    from alembic import command
    from alembic.config import Config

    config = Config(attributes={"connection": connection, "version_table": VERSION_TABLE})
    config.set_main_option("script_location", "apportion.studies.database:migrations")
    command.upgrade(config, "head")


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Holds the lock file at `path`, which is there only while somebody holds it."""
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
