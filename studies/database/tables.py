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


def _number(name: str) -> Column[int]:
    return Column(name, Integer, primary_key=True, autoincrement=False)


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
    Column("stop", Text),  # how its driver is asked to stop: "gently" or "now"
    Column("token", Text),  # of who made the row or took the lease: the same call asked twice
    CheckConstraint("state IN ('running', 'stopped', 'done', 'failed')", name="state"),
)

changes = Table(
    "changes",
    metadata,
    _study_id(),
    _number("number"),
    Column("first_round", Integer, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("change", Text, nullable=False),  # JSON: limits, tokens, workers
)

stage_outputs = Table(
    "stage_outputs",
    metadata,
    _study_id(),
    Column("stage", Text, primary_key=True),
    _number("round"),
    Column("output", Text, nullable=False),  # JSON
    Column("seconds", Double, nullable=False),
)

layouts = Table(
    "layouts",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("hash", LargeBinary, nullable=False, unique=True),
    Column("layout", Text, nullable=False),  # JSON: how the packed columns of trials are read
)

trials = Table(
    "trials",
    metadata,
    _study_id(),
    _number("number"),
    Column("round", Integer, nullable=False),
    Column("layout_id", Integer, ForeignKey("layouts.id"), nullable=False),
    Column("configuration", LargeBinary, nullable=False),  # packed: an option of each site
    Column("first_window", Integer, nullable=False),
    Column("windows", Integer, nullable=False),
    Column("part", Text, nullable=False),
    Column("origin", Text, nullable=False),
    Column("vector", LargeBinary),  # packed: what the solver itself keeps of the proposal
    Column("costs", LargeBinary, nullable=False),  # packed: a value of each kind
    Column("evaluation_key", LargeBinary, nullable=False),
    CheckConstraint("part IN ('search', 'heldout')", name="part"),
    # the rows lie in the key's order, without a second tree for the key
    sqlite_with_rowid=False,
)
Index(None, trials.c.evaluation_key)

evaluations = Table(
    "evaluations",
    metadata,
    Column("key", LargeBinary, primary_key=True),
    Column("losses", LargeBinary),  # packed, one per window; null: failed
    Column("weights", LargeBinary),
    Column("failure", Text),
    Column("error_class", Text),
    Column("seconds", Double, nullable=False),
    Column("created_at", Double, nullable=False),
    sqlite_with_rowid=False,
)

uses = Table(  # evaluations that a study needs beside those of its trials
    "uses",
    metadata,
    _study_id(),
    Column("evaluation_key", LargeBinary, primary_key=True),
    sqlite_with_rowid=False,
)
Index(None, uses.c.evaluation_key)

failures = Table(  # of this study's workers; another study may try again
    "failures",
    metadata,
    _study_id(),
    Column("evaluation_key", LargeBinary, primary_key=True),
    Column("failure", Text, nullable=False),
    Column("error_class", Text, nullable=False),
    Column("seconds", Double, nullable=False),
)

solver_answers = Table(
    "solver_answers",
    metadata,
    _study_id(),
    _number("round"),
    Column("question", Text, primary_key=True),
    Column("answer", Text, nullable=False),  # JSON
)

bills = Table(
    "bills",
    metadata,
    _study_id(),
    _number("epoch"),  # of the driver whose workers it was
    Column("outcome", Text, primary_key=True),
    Column("executions", Integer, nullable=False),
    Column("seconds", Double, nullable=False),
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


@compiles(database_clock, "postgresql")
def _postgresql_clock(element: database_clock, compiler: SQLCompiler, **kw: Any) -> str:
    # now() stands still during a transaction, which may have waited for a lock
    return "CAST(extract(epoch FROM clock_timestamp()) AS double precision)"
