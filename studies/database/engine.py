"""Transactions: the one place that commits, retries, and tells errors in the user's words."""

import random
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, TypeVar

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import SQLAlchemyError

from apportion.errors import ApportionError

PATIENCE_SECONDS = 10.0
CONFLICTS = 20
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.02, 2.0
Result = TypeVar("Result")


class DatabaseAway(ApportionError):
    """The database cannot be reached; what was asked of it is to be asked again."""


@dataclass(frozen=True)
class Trouble:
    """What a failed transaction means.

    Attributes:
        kind: "conflict": others were in the way, do it again; "away": the database cannot be
            reached; "final": doing it again would fail again.
        error: what the user is told if it ends there.
    """

    kind: Literal["conflict", "away", "final"]
    error: ApportionError


class Server(Protocol):
    """What SQLite and PostgreSQL do each in its own way.

    Attributes:
        name: the file or the address without its password, for messages.
        reading, writing: execution options of the two kinds of transaction.
        engine: connections to it.
    """

    name: str
    reading: dict[str, object]
    writing: dict[str, object]
    engine: Engine

    def trouble(self, error: SQLAlchemyError) -> Trouble:
        """What went wrong, one line that names the database and what to do."""
        ...

    def starting(self) -> AbstractContextManager[None]:
        """Hold while the tables are looked at and made, where transactions are not enough."""
        ...

    def before_tables(self, database: "Database") -> None:
        """Settings that the database keeps for good."""
        ...

    def lock_for_migration(self, connection: Connection) -> None:
        """Keep other migrations out until the transaction ends."""
        ...

    def backup(self, revision: str) -> Path | None:
        """Copy it before an upgrade from `revision`; None: the transaction is enough."""
        ...

    def problems(self, connection: Connection) -> list[str]:
        """What the engine itself finds damaged."""
        ...


class Database:
    """One database and its connections; may be used by several threads, not across a fork.

    Attributes:
        goes_on: asked while the database is away or kept locked, with the trouble and for how
            many seconds it has lasted, whether to try again. By default for 10 seconds.
    """

    def __init__(self, server: Server) -> None:
        self.server = server
        self.goes_on: Callable[[ApportionError, float], bool] = patient

    def read(self, work: Callable[[Connection], Result]) -> Result:
        """Do `work` in a transaction that sees one state, whatever others write meanwhile."""
        return self._transact(work, self.server.reading, self.goes_on)

    def write(
        self,
        work: Callable[[Connection], Result],
        goes_on: Callable[[ApportionError, float], bool] | None = None,
    ) -> Result:
        """Do `work` in a transaction that writes all of it, or nothing where it raises.

        A connection can be lost in the moment of the commit, when nobody can say whether the work
        is done. It is then done again: `work` must leave the same state when done twice.
        """
        return self._transact(work, self.server.writing, goes_on or self.goes_on)

    def close(self) -> None:
        """Closes all connections."""
        self.server.engine.dispose()

    def _transact(
        self,
        work: Callable[[Connection], Result],
        options: dict[str, object],
        goes_on: Callable[[ApportionError, float], bool],
    ) -> Result:
        conflicts, away_since, pause = 0, None, FIRST_PAUSE_SECONDS
        while True:
            try:
                with self.server.engine.connect().execution_options(**options) as connection:
                    with connection.begin():
                        return work(connection)
            except SQLAlchemyError as error:
                trouble = self.server.trouble(error)
                if trouble.kind == "conflict":
                    conflicts += 1
                    again = conflicts < CONFLICTS
                elif trouble.kind == "away":
                    now = time.monotonic()
                    away_since = now if away_since is None else away_since
                    again = goes_on(trouble.error, now - away_since)
                else:
                    again = False
                if not again:
                    raise trouble.error from error
            # at random, so that those who were in each other's way do not meet again
            time.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)


def patient(error: ApportionError, seconds: float) -> bool:
    """Go on for a while: what a command does."""
    return seconds < PATIENCE_SECONDS


def at_once(error: ApportionError, seconds: float) -> bool:
    """Try once more, over a new connection: the old one may have been lost long ago."""
    return seconds == 0.0
