"""Databases of every revision come to the tables of today with all that they held."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, inspect

from apportion.studies.database import Evaluation, Store, StudyRow, schema, tables, upgrade

FIXTURES = Path(__file__).parent / "fixtures"
CONTENT = json.loads((FIXTURES / "content.json").read_text())
of_every_revision = pytest.mark.parametrize("revision", schema.REVISIONS)


def test_revisions_are_one_line_with_one_head() -> None:
    config = Config()
    config.set_main_option("script_location", "apportion.studies.database:migrations")
    scripts = ScriptDirectory.from_config(config)
    assert scripts.get_heads() == [schema.REVISIONS[-1]]
    assert scripts.get_bases() == [schema.REVISIONS[0]]
    line = list(scripts.walk_revisions())
    assert tuple(script.revision for script in reversed(line)) == schema.REVISIONS
    assert not any(script.is_branch_point or script.is_merge_point for script in line)


def test_there_is_a_database_of_every_revision() -> None:
    """For the newest too: run fixtures/write.py before the next one is begun."""
    expected = {f"{r}.{kind}.sql" for r in schema.REVISIONS for kind in ("sqlite", "postgresql")}
    assert {path.name for path in FIXTURES.glob("*.sql")} == expected


@of_every_revision
def test_upgraded_database_holds_all(address: str, database_of: Any, revision: str) -> None:
    database_of(revision)
    upgraded = upgrade(address)
    assert (upgraded.before, upgraded.after) == (revision, schema.REVISIONS[-1])
    store = Store.open(address)
    studies = store.studies()
    assert [study.name for study in studies] == [study["name"] for study in CONTENT["studies"]]
    for study, expected in zip(studies, CONTENT["studies"], strict=True):
        assert_study(store, study, expected)
        added = CONTENT["since_0002"][study.name] if revision >= "0002" else {}
        assert_added(store, study, added)
    assert_evaluations(store)
    for fingerprint, taken in CONTENT["measurements"].items():
        assert store.measurements(fingerprint) == taken
    assert store.check().problems == []
    store.close()


def assert_study(store: Store, study: StudyRow, expected: dict[str, Any]) -> None:
    fields = "specification specification_hash state stage message".split()
    assert [getattr(study, field) for field in fields] == [expected[field] for field in fields]
    assert list(study.specification) == list(expected["specification"])
    assert (study.owner, study.stop, study.epoch) == (None, None, 1)
    assert study.created_at > 1.6e9
    for stage, round, output, _ in expected["stages"]:
        assert store.stage_output(study.id, stage, round) == output
    assert store.stage_seconds(study.id) == {stage: s for stage, _, _, s in expected["stages"]}
    for round in {trial["round"] for trial in expected["trials"]}:
        assert store.solver_answers(study.id, round) == expected["answers"].get(str(round), {})
    trials = [dict(vars(trial)) for trial in store.trials(study.id)]
    numbered = [trial | {"number": i} for i, trial in enumerate(expected["trials"])]
    assert trials == numbered


def assert_added(store: Store, study: StudyRow, added: dict[str, Any]) -> None:
    changes = [[change.first_round, change.values] for change in store.changes(study.id)]
    assert changes == added.get("changes", [])
    bill = {outcome: list(entry) for outcome, entry in store.bill(study.id).items()}
    assert bill == added.get("bill", {})
    for key, failure in added.get("failures", {}).items():
        assert_same(store.evaluations([key], study.id)[key], failure)


def assert_evaluations(store: Store) -> None:
    found = store.evaluations(CONTENT["evaluations"])
    assert set(found) == set(CONTENT["evaluations"])
    for key, expected in CONTENT["evaluations"].items():
        assert_same(found[key], expected)


def assert_same(found: Evaluation, expected: dict[str, Any]) -> None:
    told = ("failure", "error_class", "seconds")
    assert [getattr(found, name) for name in told] == [expected[name] for name in told]
    for name in ("losses", "weights"):
        values, array = expected.get(name), getattr(found, name)
        if values is None:
            assert array is None
        else:
            assert array.tobytes() == np.array(values, np.float64).tobytes()


@of_every_revision
def test_upgraded_database_takes_new_rows(address: str, database_of: Any, revision: str) -> None:
    database_of(revision)
    upgrade(address)
    store = Store.open(address)
    study = store.create_study("new", {}, "hash")
    assert study.id == 1 + len(CONTENT["studies"])
    old = store.acquire(1, 60)
    assert old.epoch == 2
    trials = CONTENT["studies"][0]["trials"]
    assert store.trial_count(old.study_id) == len(trials)
    store.close()


@pytest.mark.parametrize("revision", [None, *schema.REVISIONS])
def test_tables_are_those_of_today(address: str, database_of: Any, revision: str | None) -> None:
    """Whichever way a database came there; `revision` None: from an empty one."""
    if revision is not None:
        database_of(revision)
    upgrade(address)
    store = Store.open(address)

    def work(connection: Connection) -> tuple[Any, dict[str, Any], dict[str, Any]]:
        options = {"version_table": schema.VERSION_TABLE, "compare_server_default": True}
        context = MigrationContext.configure(connection, opts=options)
        difference = compare_metadata(context, tables.metadata)
        migrated = described(connection)
        tables.metadata.drop_all(connection)
        tables.metadata.create_all(connection)
        return difference, migrated, described(connection)

    difference, migrated, direct = store.database.write(work)
    store.close()
    assert difference == []
    assert migrated == direct


def described(connection: Connection) -> dict[str, Any]:
    """All that can be said of the tables, also what Alembic does not compare."""
    inspector = inspect(connection)
    found: dict[str, Any] = {}
    for name in sorted(set(inspector.get_table_names()) - {schema.VERSION_TABLE}):
        columns = [str(sorted(column.items(), key=str)) for column in inspector.get_columns(name)]
        found[name] = [
            sorted(columns),
            inspector.get_pk_constraint(name),
            *(
                sorted(map(str, part(name)))
                for part in (
                    inspector.get_foreign_keys,
                    inspector.get_unique_constraints,
                    inspector.get_check_constraints,
                    inspector.get_indexes,
                )
            ),
        ]
    if connection.dialect.name == "sqlite":
        made = connection.exec_driver_sql("SELECT name, sql FROM sqlite_master WHERE sql <> ''")
        found["without rowid"] = sorted(name for name, sql in made if "WITHOUT ROWID" in sql)
    return found
