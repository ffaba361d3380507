"""The store: everything that a study must not lose."""

from pathlib import Path

from apportion.errors import ApportionError
from apportion.studies.database import schema
from apportion.studies.database.engine import Database, Server
from apportion.studies.database.location import located
from apportion.studies.database.sqlite import SQLite
from apportion.studies.database.upkeep import Upkeep


class Store(Upkeep):
    """One database of studies, open.

    Written by one driver per study, which holds a *lease* on it; whatever writes to a study takes
    the lease and raises LeaseLost, writing nothing, once the study was leased to another or
    released. Evaluations and measurements belong to no study: they are named by what they are
    of, the first writer wins, and nothing ever changes them.

    Each method is one transaction: it sees one state of the database and, when it returns, has
    written all of its work to the disk; when it raises, or the process dies before, nothing.
    What was read is not changed by later writes. May be used by several threads. Done twice, it
    leaves what it leaves done once: that is why a lost connection can be answered by trying again.

    What is handed in as a mapping is stored as JSON: string keys, no NaN, no infinity.

    Any method may raise, naming the database: InvalidInput where it cannot be written or is no
    database of ours, DatabaseAway where it cannot be reached or another process keeps it locked,
    ApportionError where the disk is full or failed, or where it is damaged.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    @classmethod
    def open(cls, address: str | Path) -> "Store":
        """Opens the database at an address; makes its tables where it is empty.

        Raises InvalidInput for other addresses, network disks, the databases of other programs,
        of a newer version of this one, and of an older one, which `upgrade` brings up to date.
        """
        database = Database(server_at(address))
        try:
            schema.prepare(database)
        except ApportionError:
            database.close()
            raise
        return cls(database)

    def close(self) -> None:
        """Closes the connections; leases stand until released or expired."""
        self._database.close()

    @property
    def database(self) -> Database:
        """Its transactions."""
        return self._database


def server_at(address: str | Path) -> Server:
    """The database that an address names. Raises InvalidInput."""
    place = located(address)
    if isinstance(place, Path):
        return SQLite(place)
    from apportion.studies.database.postgresql import PostgreSQL

    return PostgreSQL(place)


def upgrade(address: str | Path) -> schema.Upgraded:
    """Bring an older database up to date, after a backup where it is a file.

    Raises InvalidInput like `Store.open`, ApportionError where the backup cannot be written.
    """
    database = Database(server_at(address))
    try:
        return schema.upgrade(database)
    finally:
        database.close()
