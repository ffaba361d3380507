"""The tables, as the code of today wants them. `migrations/` is how a database gets there."""

from typing import Any

from sqlalchemy import (
    CheckConstraint,
    Column,
    Double,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
)
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.expression import ColumnElement

metadata = MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
        "uq": "uq_%(table_name)s_%(column_0_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "ix": "ix_%(table_name)s_%(column_0_name)s",
    }
)


def _study_id() -> Column[int]:
    return Column("study_id", Integer, ForeignKey("studies.id"), primary_key=True)


studies = Table(
    "studies",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("name", Text, nullable=False, unique=True),
    Column("specification", Text, nullable=False),  # JSON
    Column("specification_hash", Text, nullable=False),
    Column("created_at", Double, nullable=False),  # seconds since 1970, the database's clock
    Column("state", Text, nullable=False),
    Column("stage", Text, nullable=False),
    Column("message", Text, nullable=False),
    Column("owner", Text),  # JSON: host, pid, started; null: nobody runs it
    Column("epoch", Integer, nullable=False),  # one more at each change of owner
    Column("lease_until", Double, nullable=False),  # seconds since 1970, the database's clock
    CheckConstraint("state IN ('running', 'stopped', 'done', 'failed')", name="state"),
)

stage_outputs = Table(
    "stage_outputs",
    metadata,
    _study_id(),
    Column("stage", Text, primary_key=True),
    Column("round", Integer, primary_key=True, autoincrement=False),
    Column("output", Text, nullable=False),  # JSON
    Column("seconds", Double, nullable=False),
)

trials = Table(
    "trials",
    metadata,
    _study_id(),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("round", Integer, nullable=False),
    Column("configuration", Text, nullable=False),  # canonical JSON: site -> option
    Column("first_window", Integer, nullable=False),
    Column("windows", Integer, nullable=False),
    Column("part", Text, nullable=False),
    Column("origin", Text, nullable=False),
    Column("vector", Text),  # JSON: what the solver itself keeps of the proposal
    Column("costs", Text, nullable=False),  # JSON: kind -> value
    Column("evaluation_key", Text, nullable=False),
    CheckConstraint("part IN ('search', 'heldout')", name="part"),
)
Index(None, trials.c.evaluation_key)

evaluations = Table(
    "evaluations",
    metadata,
    Column("key", Text, primary_key=True),
    Column("losses", LargeBinary),  # little-endian float64, one per window; null: failed
    Column("weights", LargeBinary),
    Column("failure", Text),
    Column("seconds", Double, nullable=False),
    Column("created_at", Double, nullable=False),
)

solver_states = Table(
    "solver_states",
    metadata,
    _study_id(),
    Column("round", Integer, primary_key=True, autoincrement=False),
    Column("json", Text, nullable=False),
)

measurements = Table(
    "measurements",
    metadata,
    Column("fingerprint", Text, primary_key=True),
    Column("key", Text, primary_key=True),
    Column("json", Text, nullable=False),
)


class database_clock(ColumnElement[float]):
    """Seconds since 1970 by the database's clock: the one clock that leases know."""

    type = Double()
    inherit_cache = True


@compiles(database_clock, "sqlite")
def _sqlite_clock(element: database_clock, compiler: SQLCompiler, **kw: Any) -> str:
    # unixepoch('subsec') needs SQLite 3.42
    return "((julianday('now') - 2440587.5) * 86400.0)"
