"""A study's trials in a database of Optuna's."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from apportion.errors import InvalidInput
from apportion.hashing import content_hash
from apportion.studies.database import Store
from apportion.studies.optuna_view.export import export_study

from .conftest import Written, specification, written


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/trials.db"


def numbers(url: str, name: str = "demo") -> list[int]:
    study = optuna.load_study(study_name=name, storage=url)
    return [trial.user_attrs["number"] for trial in study.trials]


def test_a_trial_on_the_full_slice_is_complete_with_its_loss_and_its_limited_costs(
    study: Written, url: str
) -> None:
    trial = study.propose({"block.0.a": "w4g64"}, costs=(2e6, 4.5, 3.0))
    study.evaluate(trial, loss=0.25)
    assert export_study(study.store, study.row, url) == 1
    found = optuna.load_study(study_name="demo", storage=url)
    assert found.metric_names == ["loss", "weight_bytes", "latency.here"]
    assert [direction.name for direction in found.directions] == ["MINIMIZE"] * 3
    (exported,) = found.trials
    assert exported.state == TrialState.COMPLETE
    assert exported.values == [0.25, 2e6, 3.0]
    assert exported.params["share_quantized"] == 0.25
    assert exported.user_attrs["origin"] == "hybrid:b1:mutant"
    assert exported.user_attrs["evaluation"] == trial.evaluation_key
    assert exported.user_attrs["configuration"] == content_hash(dict(trial.configuration))
    assert exported.duration is not None and exported.duration.total_seconds() == 1.5


def test_a_loss_on_a_part_of_the_slice_is_never_a_value(study: Written, url: str) -> None:
    study.evaluate(study.propose(windows=2), loss=0.125)
    study.evaluate(study.propose(costs=(5e5, 4.5, 3.0)), loss=0.5)
    export_study(study.store, study.row, url)
    found = optuna.load_study(study_name="demo", storage=url)
    assert [trial.state for trial in found.trials] == [TrialState.PRUNED, TrialState.COMPLETE]
    assert found.trials[0].values is None
    assert found.trials[0].user_attrs["loss_on_part"] == 0.125
    assert found.trials[0].user_attrs["windows"] == 2
    assert [trial.number for trial in found.best_trials] == [1]


def test_the_full_slice_is_as_long_as_the_data_were_found_to_be(study: Written, url: str) -> None:
    study.store.record_stage(study.lease, "discover", 0, {"windows": {"search": 5}}, 1.0)
    study.evaluate(study.propose(windows=5))
    export_study(study.store, study.row, url)
    assert optuna.load_study(study_name="demo", storage=url).trials[0].state == TrialState.COMPLETE


def test_what_failed_is_failed_and_says_why(study: Written, url: str) -> None:
    study.fail(study.propose())
    study.fail(study.propose(), error_class="memory")
    study.evaluate(study.propose(), loss=float("nan"))
    export_study(study.store, study.row, url)
    found = optuna.load_study(study_name="demo", storage=url).trials
    assert [trial.state for trial in found] == [TrialState.FAIL] * 3
    assert [trial.user_attrs["failure"] for trial in found] == [
        "out of memory",
        "out of memory",
        "the loss is not finite",
    ]


def test_trials_in_flight_are_left_out_until_they_are_finished(study: Written, url: str) -> None:
    first, second = study.propose(), study.propose()
    study.evaluate(second)
    assert export_study(study.store, study.row, url) == 1
    assert numbers(url) == [1]
    study.evaluate(first)
    assert export_study(study.store, study.row, url) == 1
    assert numbers(url) == [1, 0]


def test_done_again_it_adds_only_what_is_new(study: Written, url: str) -> None:
    study.evaluate(study.propose())
    export_study(study.store, study.row, url)
    assert export_study(study.store, study.row, url) == 0
    study.evaluate(study.propose())
    assert export_study(study.store, study.row, url) == 1
    assert numbers(url) == [0, 1]


KILLED_IN_THE_MIDDLE = """
import os, signal, sys
from sqlalchemy import event
from sqlalchemy.engine import Engine
from apportion.studies.database import Store
from apportion.studies.optuna_view.export import export_study

left = int(sys.argv[3])

@event.listens_for(Engine, "before_cursor_execute")
def count(connection, cursor, statement, parameters, context, many):
    global left
    writes = statement.split()[0] in ("CREATE", "INSERT", "UPDATE")
    if writes and "trials.db" in str(connection.engine.url):
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

store = Store.open(sys.argv[1])
export_study(store, store.find_study("demo"), sys.argv[2])
"""


@pytest.mark.parametrize("statements", [3, 4, 12, 18, 22, 23, 24, 26, 45, 70])
def test_a_kill_in_the_middle_loses_and_doubles_nothing(
    study: Written, url: str, tmp_path: Path, statements: int
) -> None:
    for _ in range(4):
        study.evaluate(study.propose())
    arguments = [str(tmp_path / "studies.db"), url, str(statements)]
    killed = subprocess.run([sys.executable, "-P", "-c", KILLED_IN_THE_MIDDLE, *arguments])
    assert killed.returncode == -signal.SIGKILL
    export_study(study.store, study.row, url)
    found = optuna.load_study(study_name="demo", storage=url)
    assert [trial.user_attrs["number"] for trial in found.trials] == [0, 1, 2, 3]
    assert {trial.state for trial in found.trials} == {TrialState.COMPLETE}
    assert found.metric_names == ["loss", "weight_bytes", "latency.here"]


def test_a_constraint_is_the_share_by_which_a_cost_is_above_its_limit(
    store: Store, url: str
) -> None:
    study = written(store, specification(weight_bytes="1 MB", bits="9"))
    study.evaluate(study.propose(costs=(2e6, 4.5, 3.0)))
    export_study(store, study.row, url)
    (trial,) = optuna.load_study(study_name="demo", storage=url).trials
    assert trial.system_attrs["constraints"] == [1.0, -0.5]
    assert list(trial.constraints.values()) == [1.0, -0.5]


def test_a_relative_limit_counts_once_its_round_is_confirmed(study: Written, url: str) -> None:
    study.evaluate(study.propose(costs=(2e6, 4.5, 3.0)))
    study.confirm({"weight_bytes": 1e6, "latency.here": 2.0})
    export_study(study.store, study.row, url)
    (trial,) = optuna.load_study(study_name="demo", storage=url).trials
    assert trial.system_attrs["constraints"] == [1.0, 0.5]


def test_a_changed_limit_holds_from_its_round_on_and_changes_no_objective(
    store: Store, url: str
) -> None:
    study = written(store, specification(weight_bytes="1 MB"))
    study.evaluate(study.propose(costs=(2e6, 4.5, 3.0)))
    change = {"limits": {"weight_bytes": "4 MB", "bits": "3"}}
    store.record_change(study.lease, 1, change)
    study.evaluate(study.propose(costs=(2e6, 4.5, 3.0), round=1))
    export_study(store, study.row, url)
    trials = optuna.load_study(study_name="demo", storage=url).trials
    assert [trial.system_attrs["constraints"] for trial in trials] == [[1.0], [-0.5, 0.5]]
    assert [trial.values for trial in trials] == [[0.25, 2e6]] * 2


def test_studies_share_a_database(study: Written, store: Store, url: str) -> None:
    other = written(store, specification("other"))
    for one in (study, other):
        one.evaluate(one.propose())
        export_study(store, one.row, url)
    assert numbers(url, "demo") == numbers(url, "other") == [0]


def refusal(study: Written, url: str) -> str:
    with pytest.raises(InvalidInput) as refused:
        export_study(study.store, study.row, url)
    told = str(refused.value)
    assert "\n" not in told
    return told


def test_another_study_of_the_name_is_refused_and_left_as_it_was(study: Written, url: str) -> None:
    theirs = optuna.create_study(study_name="demo", storage=url)
    theirs.add_trial(optuna.create_trial(value=1.0))
    assert 'holds another study "demo"' in refusal(study, url)
    assert len(theirs.trials) == 1


def test_the_same_study_file_submitted_elsewhere_is_another_study(
    study: Written, url: str, tmp_path: Path
) -> None:
    export_study(study.store, study.row, url)
    elsewhere = Store.open(tmp_path / "elsewhere.db")
    again = written(elsewhere, specification())
    assert 'holds another study "demo"' in refusal(again, url)
    elsewhere.close()


def test_our_own_database_is_refused_and_left_as_it_was(study: Written, tmp_path: Path) -> None:
    study.evaluate(study.propose())
    told = refusal(study, f"sqlite:///{tmp_path}/studies.db")
    assert "is the database of another program" in told
    Store.open(tmp_path / "studies.db").close()
    assert len(study.store.trials(study.row.id)) == 1


@pytest.mark.parametrize(
    "url",
    ["trials.db", "sqlite://", "sqlite:////no/such/folder/trials.db", "redis://here/0", "x+y://z"]
    + ["postgresql://here:port/trials"],
)
def test_a_url_that_cannot_be_used_is_told_in_one_line(study: Written, url: str) -> None:
    assert 'write for example "sqlite:///trials.db"' in refusal(study, url)


def test_a_password_is_not_told(study: Written) -> None:
    told = refusal(study, "postgresql+psycopg://user:secret@127.0.0.1:1/trials")
    assert "secret" not in told


def test_a_file_that_is_no_database_is_refused(study: Written, tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("not a database, " * 100)
    assert "cannot be used" in refusal(study, f"sqlite:///{file}")
    assert os.path.getsize(file) == 1600
