"""Packed trials and results, bills, changes; what is asked of a driver."""

import json
from collections.abc import Iterable
from typing import Any

import numpy as np
import sqlalchemy as sa
from alembic import op

from apportion.hashing import canonical_json, content_hash
from apportion.studies.database.packing import pack_floats, pack_indices

revision = "0002"
down_revision = "0001"

ROWS_AT_A_TIME = 500


def _study_id() -> sa.Column[int]:
    return sa.Column("study_id", sa.Integer, nullable=False)


def _key_to_study(table: str) -> sa.ForeignKeyConstraint:
    name = f"fk_{table}_study_id_studies"
    return sa.ForeignKeyConstraint(["study_id"], ["studies.id"], name=name)


def upgrade() -> None:
    """Adds tables, then moves trials, evaluations and solvers' states into packed ones."""
    op.add_column("studies", sa.Column("stop", sa.Text))
    op.add_column("studies", sa.Column("token", sa.Text))
    op.rename_table("trials", "old_trials")
    op.rename_table("evaluations", "old_evaluations")
    op.drop_index("ix_trials_evaluation_key", "old_trials")
    _free_names()
    _make_tables()
    _make_tables_of_workers()
    connection = op.get_bind()
    _move_trials(connection)
    _move_evaluations(connection)
    _move_states(connection)
    op.drop_table("old_trials")
    op.drop_table("old_evaluations")
    op.drop_table("solver_states")


def _free_names() -> None:
    # PostgreSQL's constraints keep their names when a table is renamed; an index's must be unique
    if op.get_bind().dialect.name == "postgresql":
        op.execute("ALTER TABLE old_trials RENAME CONSTRAINT pk_trials TO pk_old_trials")
        op.execute(
            "ALTER TABLE old_evaluations RENAME CONSTRAINT pk_evaluations TO pk_old_evaluations"
        )


def _make_tables() -> None:
    op.create_table(
        "changes",
        _study_id(),
        sa.Column("number", sa.Integer, nullable=False),
        sa.Column("first_round", sa.Integer, nullable=False),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.Column("change", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("study_id", "number", name="pk_changes"),
        _key_to_study("changes"),
    )
    op.create_table(
        "layouts",
        sa.Column("id", sa.Integer, nullable=False),
        sa.Column("hash", sa.LargeBinary, nullable=False),
        sa.Column("layout", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_layouts"),
        sa.UniqueConstraint("hash", name="uq_layouts_hash"),
    )
    op.create_table(
        "trials",
        _study_id(),
        sa.Column("number", sa.Integer, nullable=False),
        sa.Column("round", sa.Integer, nullable=False),
        sa.Column("layout_id", sa.Integer, nullable=False),
        sa.Column("configuration", sa.LargeBinary, nullable=False),
        sa.Column("first_window", sa.Integer, nullable=False),
        sa.Column("windows", sa.Integer, nullable=False),
        sa.Column("part", sa.Text, nullable=False),
        sa.Column("origin", sa.Text, nullable=False),
        sa.Column("vector", sa.LargeBinary),
        sa.Column("costs", sa.LargeBinary, nullable=False),
        sa.Column("evaluation_key", sa.LargeBinary, nullable=False),
        sa.CheckConstraint("part IN ('search', 'heldout')", name="ck_trials_part"),
        sa.PrimaryKeyConstraint("study_id", "number", name="pk_trials"),
        _key_to_study("trials"),
        sa.ForeignKeyConstraint(["layout_id"], ["layouts.id"], name="fk_trials_layout_id_layouts"),
        sqlite_with_rowid=False,
    )
    op.create_index("ix_trials_evaluation_key", "trials", ["evaluation_key"])
    op.create_table(
        "evaluations",
        sa.Column("key", sa.LargeBinary, nullable=False),
        sa.Column("losses", sa.LargeBinary),
        sa.Column("weights", sa.LargeBinary),
        sa.Column("failure", sa.Text),
        sa.Column("error_class", sa.Text),
        sa.Column("seconds", sa.Double, nullable=False),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.PrimaryKeyConstraint("key", name="pk_evaluations"),
        sqlite_with_rowid=False,
    )


def _make_tables_of_workers() -> None:
    op.create_table(
        "uses",
        _study_id(),
        sa.Column("evaluation_key", sa.LargeBinary, nullable=False),
        sa.PrimaryKeyConstraint("study_id", "evaluation_key", name="pk_uses"),
        _key_to_study("uses"),
        sqlite_with_rowid=False,
    )
    op.create_index("ix_uses_evaluation_key", "uses", ["evaluation_key"])
    op.create_table(
        "failures",
        _study_id(),
        sa.Column("evaluation_key", sa.LargeBinary, nullable=False),
        sa.Column("failure", sa.Text, nullable=False),
        sa.Column("error_class", sa.Text, nullable=False),
        sa.Column("seconds", sa.Double, nullable=False),
        sa.PrimaryKeyConstraint("study_id", "evaluation_key", name="pk_failures"),
        _key_to_study("failures"),
    )
    op.create_table(
        "solver_answers",
        _study_id(),
        sa.Column("round", sa.Integer, nullable=False),
        sa.Column("question", sa.Text, nullable=False),
        sa.Column("answer", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("study_id", "round", "question", name="pk_solver_answers"),
        _key_to_study("solver_answers"),
    )
    op.create_table(
        "bills",
        _study_id(),
        sa.Column("epoch", sa.Integer, nullable=False),
        sa.Column("outcome", sa.Text, nullable=False),
        sa.Column("executions", sa.Integer, nullable=False),
        sa.Column("seconds", sa.Double, nullable=False),
        sa.PrimaryKeyConstraint("study_id", "epoch", "outcome", name="pk_bills"),
        _key_to_study("bills"),
    )


def _table(name: str, *columns: str) -> sa.TableClause:
    return sa.table(name, *(sa.column(column) for column in columns))


def _pages(connection: sa.Connection, query: str, key: str) -> Iterable[list[Any]]:
    """The rows of `query` (its last condition is `key > :after`), some at a time."""
    after: Any = None
    while True:
        condition = "" if after is None else f" WHERE {key} > :after"
        page = sa.text(f"{query}{condition} ORDER BY {key} LIMIT {ROWS_AT_A_TIME}")
        rows = list(connection.execute(page, {} if after is None else {"after": after}))
        if not rows:
            return
        yield rows
        after = getattr(rows[-1], key)


def _move_trials(connection: sa.Connection) -> None:
    """A study's trials of the same sites and kinds of cost share the layout of their options."""
    query = "SELECT * FROM old_trials WHERE study_id = :study ORDER BY number"
    columns = "study_id number round layout_id configuration first_window windows part origin"
    packed = _table("trials", *columns.split(), "vector", "costs", "evaluation_key")
    studies = connection.execute(sa.text("SELECT DISTINCT study_id FROM old_trials")).scalars()
    for study in list(studies):
        alike: dict[tuple[tuple[str, ...], ...], list[Any]] = {}
        for trial in connection.execute(sa.text(query), {"study": study}):
            held = tuple(json.loads(trial.configuration)), tuple(json.loads(trial.costs))
            alike.setdefault(held, []).append(trial)
        for (_, kinds), trials in alike.items():
            options = _options_of(trials)
            layout_id = _layout_id(connection, options, list(kinds))
            rows = [_packed_trial(trial, layout_id, options, list(kinds)) for trial in trials]
            connection.execute(sa.insert(packed), rows)


def _options_of(trials: Iterable[Any]) -> dict[str, list[str]]:
    options: dict[str, list[str]] = {}
    for trial in trials:
        for site, option in json.loads(trial.configuration).items():
            held = options.setdefault(site, [])
            if option not in held:
                held.append(option)
    return options


def _layout_id(connection: sa.Connection, options: dict[str, list[str]], kinds: list[str]) -> int:
    value = {"options": list(options.items()), "costs": kinds}
    digest = bytes.fromhex(content_hash(value))
    layouts = _table("layouts", "id", "hash", "layout")
    known = sa.select(layouts.c.id).where(layouts.c.hash == digest)
    if connection.execute(known).first() is None:
        row = {"hash": digest, "layout": canonical_json(value)}
        connection.execute(sa.insert(layouts).values(row))
    return int(connection.execute(known).scalar_one())


def _packed_trial(
    trial: Any, layout_id: int, options: dict[str, list[str]], kinds: list[str]
) -> dict[str, Any]:
    configuration, costs = json.loads(trial.configuration), json.loads(trial.costs)
    indices = [held.index(configuration[site]) for site, held in options.items()]
    vector = None if trial.vector is None else pack_indices(json.loads(trial.vector))
    kept = "study_id number round first_window windows part origin".split()
    return {name: getattr(trial, name) for name in kept} | {
        "layout_id": layout_id,
        "configuration": pack_indices(indices),
        "vector": vector,
        "costs": pack_floats(np.array([costs[kind] for kind in kinds], np.float64)),
        "evaluation_key": bytes.fromhex(trial.evaluation_key),
    }


def _move_evaluations(connection: sa.Connection) -> None:
    columns = "key losses weights failure error_class seconds created_at".split()
    packed = _table("evaluations", *columns)
    for rows in _pages(connection, "SELECT * FROM old_evaluations", "key"):
        connection.execute(sa.insert(packed), [_packed_evaluation(row) for row in rows])


def _packed_evaluation(row: Any) -> dict[str, Any]:
    failed = "not finite" if "not finite" in (row.failure or "") else "raised"
    return {
        "key": bytes.fromhex(row.key),
        "losses": _packed_floats(row.losses),
        "weights": _packed_floats(row.weights),
        "failure": row.failure,
        "error_class": None if row.failure is None else failed,
        "seconds": row.seconds,
        "created_at": row.created_at,
    }


def _packed_floats(values: bytes | None) -> bytes | None:
    return None if values is None else pack_floats(np.frombuffer(values, "<f8"))


def _move_states(connection: sa.Connection) -> None:
    answers = _table("solver_answers", "study_id", "round", "question", "answer")
    for state in list(connection.execute(sa.text("SELECT * FROM solver_states"))):
        rows = [
            {
                "study_id": state.study_id,
                "round": state.round,
                "question": question,
                "answer": canonical_json(answer),
            }
            for question, answer in json.loads(state.json).items()
        ]
        if rows:
            connection.execute(sa.insert(answers), rows)
