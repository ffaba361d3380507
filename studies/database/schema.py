"""Brings a database to the tables of this version, once, however many processes open it."""

from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Connection, inspect, select, text

from apportion.errors import InvalidInput
from apportion.studies.database import tables
from apportion.studies.database.engine import Database

REVISIONS = ("0001", "0002")  # all of migrations/versions/, the newest last
VERSION_TABLE = "apportion_revision"


@dataclass(frozen=True)
class Upgraded:
    """What an upgrade did: revisions, and the copy of what was there before, if it made one."""

    before: str | None
    after: str
    backup: Path | None


def prepare(database: Database) -> None:
    """Makes the tables of an empty database, in one transaction.

    Raises InvalidInput where it belongs to another version or to another program.
    """
    with database.server.starting():
        revision = database.read(lambda connection: revision_of(connection, database.server.name))
        if revision is None:
            database.server.before_tables(database)
            database.write(lambda connection: _migrate(connection, database))
        elif revision != REVISIONS[-1]:
            raise InvalidInput(
                f"{database.server.name}: is of an older apportion (revision {revision}, this one "
                f"needs {REVISIONS[-1]}); bring it up to date: apportion db upgrade"
            )


def upgrade(database: Database) -> Upgraded:
    """Brings a database of any known revision to the newest, in one transaction.

    Raises InvalidInput like `prepare`, and while a study is being run.
    """
    server = database.server
    with server.starting():
        revision = database.read(lambda connection: revision_of(connection, server.name))
        copy = None
        if revision is None:
            server.before_tables(database)
        elif revision != REVISIONS[-1]:
            database.read(lambda connection: _refuse_running(connection, server.name))
            copy = server.backup(revision)
        if revision != REVISIONS[-1]:
            database.write(lambda connection: _migrate(connection, database))
        return Upgraded(revision, REVISIONS[-1], copy)


def revision_of(connection: Connection, name: str) -> str | None:
    """The revision of the tables; None: there are none.

    Raises InvalidInput where they are of a newer version or of another program.
    """
    found = set(inspect(connection).get_table_names())
    if VERSION_TABLE not in found:
        # A file is ours alone; a server's database may hold what does not touch us.
        ours = found if connection.dialect.name == "sqlite" else found & set(tables.metadata.tables)
        if ours:
            raise InvalidInput(f"{name}: is the database of another program; name another one")
        return None
    query = text(f"SELECT version_num FROM {VERSION_TABLE}")
    revision = str(connection.execute(query).scalar_one())
    if revision not in REVISIONS:
        raise InvalidInput(
            f"{name}: needs an apportion that knows revision {revision};"
            f" this one knows up to {REVISIONS[-1]}: upgrade apportion, or name another database"
        )
    return revision


def _refuse_running(connection: Connection, name: str) -> None:
    # Only columns that every revision has: these tables are not of today.
    held = text("SELECT name, lease_until FROM studies WHERE owner IS NOT NULL")
    now = connection.execute(select(tables.database_clock())).scalar_one()
    running = [row.name for row in connection.execute(held) if row.lease_until > now]
    if running:
        raise InvalidInput(f"{name}: study {', '.join(running)} is being run; stop it first")


def _migrate(connection: Connection, database: Database) -> None:
    # imported here: most runs find a database that needs nothing
    from alembic import command
    from alembic.config import Config

    database.server.lock_for_migration(connection)
    revision = revision_of(connection, database.server.name)
    if revision == REVISIONS[-1]:
        return  # another process was first
    if revision is not None:
        _refuse_running(connection, database.server.name)  # since it was asked before the backup
    config = Config(attributes={"connection": connection, "version_table": VERSION_TABLE})
    config.set_main_option("script_location", "apportion.studies.database:migrations")
    command.upgrade(config, "head")
