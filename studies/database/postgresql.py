"""PostgreSQL: several machines, one database; a server that may be away for a while."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from sqlalchemy import URL, Connection, create_engine, text
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from apportion.errors import ApportionError, InvalidInput
from apportion.studies.database.engine import Database, DatabaseAway, Trouble
from apportion.studies.database.location import shown

CONNECT_SECONDS = 5
# A driver that is stopped in the middle of a transaction must not keep a study's row for ever.
SETTINGS = {
    "lock_timeout": "30s",
    "statement_timeout": "60s",
    "idle_in_transaction_session_timeout": "30s",
    "synchronous_commit": "on",
    "timezone": "UTC",
}
MIGRATION_LOCK = 0x6170706F7274  # any number that no other program takes
# https://www.postgresql.org/docs/15/errcodes-appendix.html
CONFLICTS = {"40001", "40P01", "55P03"}  # serialization, deadlock, lock not available
AWAY = {"57P01", "57P02", "57P03", "57P05", "53300", "25P03"}  # shut down, crashed, starting, full
AWAY_CLASSES = {"08"}  # connection exceptions
# A connection that could not be made has no code, only the text of libpq or of the server.
HOPELESS = (
    "authentication failed",
    "no password supplied",
    "no pg_hba.conf entry",
    "does not exist",
    "permission denied",
    "Name or service not known",
    "server does not support SSL",
    "certificate verify failed",
    "connection is bad: invalid",
)
NO_SPACE = "53100"
FORBIDDEN = {"42501", "25006"}  # no privilege, read-only


class PostgreSQL:
    """A database of a server; see `Server`."""

    reading: dict[str, object] = {
        "isolation_level": "REPEATABLE READ",
        "postgresql_readonly": True,
    }
    # Each statement sees what was committed before it; rows that matter are locked first.
    writing: dict[str, object] = {"isolation_level": "READ COMMITTED"}

    def __init__(self, url: URL) -> None:
        """Raises InvalidInput where the driver is not installed."""
        self.name = shown(url)
        try:
            import psycopg  # noqa: F401
        except ImportError as error:  # also where libpq is missing
            raise InvalidInput(
                f"{self.name}: needs psycopg, which is not installed: "
                "pip install 'apportion[postgres]'"
            ) from error
        settings = " ".join(f"-c {name}={value}" for name, value in SETTINGS.items())
        self.engine = create_engine(
            url,
            connect_args={
                "options": settings,
                "connect_timeout": CONNECT_SECONDS,
                "application_name": "apportion",
                "keepalives_idle": 30,
            },
            pool_size=2,
            max_overflow=8,
        )

    def starting(self) -> AbstractContextManager[None]:
        """Nothing: a lock of the transaction keeps migrations apart."""
        return nullcontext()

    def before_tables(self, database: Database) -> None:
        """Nothing: settings belong to the connections."""

    def lock_for_migration(self, connection: Connection) -> None:
        """See `Server`."""
        connection.execute(text(f"SELECT pg_advisory_xact_lock({MIGRATION_LOCK})"))
        # moving many rows takes as long as it takes, with pauses to pack them
        for setting in ("statement_timeout", "idle_in_transaction_session_timeout"):
            connection.execute(text(f"SET LOCAL {setting} = 0"))

    def backup(self, revision: str) -> Path | None:
        """None: all of an upgrade is one transaction, and backups are the server's."""
        return None

    def problems(self, connection: Connection) -> list[str]:
        """Nothing: the server checks its own pages."""
        return []

    def trouble(self, error: SQLAlchemyError) -> Trouble:
        """See `Server`."""
        cause = error.orig if isinstance(error, DBAPIError) else error
        state = getattr(cause, "sqlstate", None) or ""
        unmade = isinstance(error, DBAPIError) and not state and _is_operational(error)
        said, hopeless = _told(str(cause) or type(cause).__name__)
        lost = unmade or (isinstance(error, DBAPIError) and error.connection_invalidated)
        if unmade and hopeless:
            return Trouble("final", InvalidInput(f"{self.name}: {said}; check the address"))
        if state in CONFLICTS:
            busy = f"{self.name}: others kept it busy ({said}); try again"
            return Trouble("conflict", DatabaseAway(busy))
        if lost or state in AWAY or state[:2] in AWAY_CLASSES:
            away = f"{self.name}: cannot be reached ({said}); is the server running?"
            return Trouble("away", DatabaseAway(away))
        if state == NO_SPACE:
            return Trouble("away", DatabaseAway(f"{self.name}: the server's disk is full"))
        if state in FORBIDDEN:
            return Trouble("final", InvalidInput(f"{self.name}: may not be written ({said})"))
        return Trouble("final", ApportionError(f"{self.name}: {said}"))


def _is_operational(error: DBAPIError) -> bool:
    # a connection that could not be made has no code
    return type(error.orig).__name__ in ("OperationalError", "ConnectionTimeout", "InterfaceError")


def _told(message: str) -> tuple[str, bool]:
    """The line of an error that says most, and whether it says that waiting is in vain."""
    # a host of several addresses has a heading, then a line for each of them
    lines = [line for line in message.strip().splitlines() if not line.endswith(":")] or [message]
    hopeless = [line for line in lines if any(words in line for words in HOPELESS)]
    return " ".join((hopeless or lines)[0].split()), bool(hopeless)
