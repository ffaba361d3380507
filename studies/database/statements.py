"""The statements that several methods of the store share, each within the caller's transaction."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from sqlalchemy import (
    Column,
    ColumnElement,
    Connection,
    Row,
    Select,
    Table,
    and_,
    func,
    insert,
    select,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite

from apportion.studies.database.rows import Lease
from apportion.studies.database.tables import database_clock, studies, trials

KEYS_PER_QUERY = 1000  # databases limit the parameters of one statement
STUDIES = select(studies, (studies.c.lease_until - database_clock()).label("lease_left"))


def equal(table: Table, key: Mapping[str, Any]) -> ColumnElement[bool]:
    """That the columns named in `key` hold its values."""
    return and_(*(table.c[name] == value for name, value in key.items()))


def hold(connection: Connection, condition: ColumnElement[bool]) -> bool:
    """Whether there is such a study; until the transaction ends nobody else can change it."""
    # SQLite has locked the whole file; others lock the row here
    study = select(studies.c.id).where(condition).with_for_update()
    return connection.execute(study).first() is not None


def stands(lease: Lease) -> ColumnElement[bool]:
    """That no other lease was given out since, and this one not given back."""
    return and_(
        studies.c.id == lease.study_id,
        studies.c.epoch == lease.epoch,
        studies.c.token == lease.token,
        studies.c.owner.is_not(None),
    )


def stored(connection: Connection, column: Column[str], key: Mapping[str, Any]) -> str | None:
    """The column's value in the row of that primary key; None: there is no such row."""
    return connection.execute(select(column).where(equal(column.table, key))).scalar()


def with_keys(
    connection: Connection, query: Select[Any], column: Column[Any], keys: Iterable[Any]
) -> Iterator[Row[Any]]:
    """The rows of `query` whose `column` is among `keys`."""
    wanted = list(keys)
    for start in range(0, len(wanted), KEYS_PER_QUERY):
        yield from connection.execute(
            query.where(column.in_(wanted[start : start + KEYS_PER_QUERY]))
        )


def insert_new(connection: Connection, table: Table, row: Mapping[str, Any]) -> bool:
    """Inserts the row unless one of its key is there; whether it did."""
    dialect = sqlite if connection.dialect.name == "sqlite" else postgresql
    insert_ = dialect.insert(table).values(**row).on_conflict_do_nothing()
    return connection.execute(insert_).rowcount > 0


def put(
    connection: Connection, table: Table, key: Mapping[str, Any], values: Mapping[str, Any]
) -> None:
    """Writes the row of that key, over the one that is there."""
    written = connection.execute(update(table).where(equal(table, key)).values(**values))
    if written.rowcount == 0:
        connection.execute(insert(table).values(**key, **values))


def next_number(connection: Connection, study_id: int) -> int:
    """The number of a study's next trial."""
    last = select(func.max(trials.c.number)).where(trials.c.study_id == study_id)
    number = connection.execute(last).scalar_one()
    return 0 if number is None else int(number) + 1
