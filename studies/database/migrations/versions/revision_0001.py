"""The first tables."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def _study_id() -> sa.Column[int]:
    return sa.Column("study_id", sa.Integer, nullable=False)


def _key_to_study(table: str) -> sa.ForeignKeyConstraint:
    name = f"fk_{table}_study_id_studies"
    return sa.ForeignKeyConstraint(["study_id"], ["studies.id"], name=name)


def upgrade() -> None:
    """Makes all tables."""
    op.create_table(
        "studies",
        sa.Column("id", sa.Integer, nullable=False),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("specification", sa.Text, nullable=False),
        sa.Column("specification_hash", sa.Text, nullable=False),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("stage", sa.Text, nullable=False),
        sa.Column("message", sa.Text, nullable=False),
        sa.Column("owner", sa.Text),
        sa.Column("epoch", sa.Integer, nullable=False),
        sa.Column("lease_until", sa.Double, nullable=False),
        sa.CheckConstraint(
            "state IN ('running', 'stopped', 'done', 'failed')", name="ck_studies_state"
        ),
        sa.PrimaryKeyConstraint("id", name="pk_studies"),
        sa.UniqueConstraint("name", name="uq_studies_name"),
    )
    _make_tables_of_a_study()
    _make_shared_tables()


def _make_tables_of_a_study() -> None:
    op.create_table(
        "stage_outputs",
        _study_id(),
        sa.Column("stage", sa.Text, nullable=False),
        sa.Column("round", sa.Integer, nullable=False),
        sa.Column("output", sa.Text, nullable=False),
        sa.Column("seconds", sa.Double, nullable=False),
        sa.PrimaryKeyConstraint("study_id", "stage", "round", name="pk_stage_outputs"),
        _key_to_study("stage_outputs"),
    )
    op.create_table(
        "trials",
        _study_id(),
        sa.Column("number", sa.Integer, nullable=False),
        sa.Column("round", sa.Integer, nullable=False),
        sa.Column("configuration", sa.Text, nullable=False),
        sa.Column("first_window", sa.Integer, nullable=False),
        sa.Column("windows", sa.Integer, nullable=False),
        sa.Column("part", sa.Text, nullable=False),
        sa.Column("origin", sa.Text, nullable=False),
        sa.Column("vector", sa.Text),
        sa.Column("costs", sa.Text, nullable=False),
        sa.Column("evaluation_key", sa.Text, nullable=False),
        sa.CheckConstraint("part IN ('search', 'heldout')", name="ck_trials_part"),
        sa.PrimaryKeyConstraint("study_id", "number", name="pk_trials"),
        _key_to_study("trials"),
    )
    op.create_index("ix_trials_evaluation_key", "trials", ["evaluation_key"])
    op.create_table(
        "solver_states",
        _study_id(),
        sa.Column("round", sa.Integer, nullable=False),
        sa.Column("json", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("study_id", "round", name="pk_solver_states"),
        _key_to_study("solver_states"),
    )


def _make_shared_tables() -> None:
    op.create_table(
        "evaluations",
        sa.Column("key", sa.Text, nullable=False),
        sa.Column("losses", sa.LargeBinary),
        sa.Column("weights", sa.LargeBinary),
        sa.Column("failure", sa.Text),
        sa.Column("seconds", sa.Double, nullable=False),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.PrimaryKeyConstraint("key", name="pk_evaluations"),
    )
    op.create_table(
        "measurements",
        sa.Column("fingerprint", sa.Text, nullable=False),
        sa.Column("key", sa.Text, nullable=False),
        sa.Column("json", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("fingerprint", "key", name="pk_measurements"),
    )
