"""optuna-dashboard itself, asked without a server."""

import io
import json
from typing import Any
from wsgiref.util import setup_testing_defaults

import pytest

from apportion.studies.optuna_view.dashboard import dashboard_app
from apportion.studies.optuna_view.storage import ReadOnlyStorage

from .conftest import Written

optuna_dashboard = pytest.importorskip("optuna_dashboard")


def ask(app: Any, method: str, path: str, body: object = None) -> tuple[int, Any]:
    """(status, answer) of one request."""
    sent = b"" if body is None else json.dumps(body).encode()
    environ: dict[str, Any] = {"REQUEST_METHOD": method, "PATH_INFO": path}
    setup_testing_defaults(environ)
    environ["CONTENT_TYPE"] = "application/json"
    environ["CONTENT_LENGTH"] = str(len(sent))
    environ["wsgi.input"] = io.BytesIO(sent)
    told: list[str] = []
    answer = b"".join(app(environ, lambda status, headers, info=None: told.append(status)))
    return int(told[0].split()[0]), json.loads(answer) if answer.startswith(b"{") else answer


@pytest.fixture
def filled(study: Written) -> Written:
    study.evaluate(study.propose({"block.0.a": "w4g64"}), loss=0.5)
    study.evaluate(study.propose(windows=2), loss=0.125)
    study.fail(study.propose())
    study.propose()
    return study


def test_the_studies_are_listed(filled: Written) -> None:
    status, answer = ask(dashboard_app(filled.store), "GET", "/api/studies")
    assert status == 200
    (found,) = answer["study_summaries"]
    assert (found["study_name"], found["directions"]) == ("demo", ["minimize"] * 3)


def test_a_study_is_shown_with_its_trials(filled: Written) -> None:
    app = dashboard_app(filled.store)
    status, answer = ask(app, "GET", f"/api/studies/{filled.row.id}")
    assert status == 200
    assert answer["objective_names"] == ["loss", "weight_bytes", "latency.here"]
    shown = [(trial["number"], trial["state"]) for trial in answer["trials"]]
    assert shown == [(0, "Complete"), (1, "Pruned"), (2, "Fail"), (3, "Running")]
    assert answer["trials"][0]["values"] == [0.5, 2e6, 3.0]
    assert answer["trials"][0]["constraints"] == [1.0]
    assert len(answer["trials"][0]["params"]) <= 12
    assert [trial["number"] for trial in answer["best_trials"]] == [0]
    assert answer["has_intermediate_values"] is False


def test_its_pages_and_its_table_are_served(filled: Written) -> None:
    app = dashboard_app(filled.store)
    assert ask(app, "GET", "/dashboard")[0] == 200
    status, table = ask(app, "GET", f"/csv/{filled.row.id}")
    assert status == 200 and b"share_quantized" in table


CHANGES = [
    ("DELETE", "/api/studies/{id}", {}),
    ("POST", "/api/studies/{id}/rename", {"study_name": "mine"}),
    ("POST", "/api/studies", {"study_name": "mine", "directions": ["minimize"]}),
    ("PUT", "/api/studies/{id}/note", {"version": 1, "body": "mine"}),
    ("PUT", "/api/studies/{id}/{trial}/note", {"version": 1, "body": "mine"}),
    ("POST", "/api/trials/{trial}/tell", {"state": "Complete", "values": [0, 0, 0]}),
    ("POST", "/api/trials/{trial}/user-attrs", {"user_attrs": {"mine": 1}}),
]


@pytest.mark.parametrize(("method", "path", "body"), CHANGES)
@pytest.mark.parametrize("guarded", [True, False], ids=["ours", "bare"])
def test_nothing_can_be_changed(
    filled: Written, method: str, path: str, body: object, guarded: bool
) -> None:
    """`bare`: the storage alone, as others may mount it."""
    storage = ReadOnlyStorage(filled.store)
    app = dashboard_app(filled.store) if guarded else optuna_dashboard.wsgi(storage)
    before = ask(app, "GET", f"/api/studies/{filled.row.id}")
    trial = storage.get_all_trials(filled.row.id)[3]._trial_id
    where = path.format(id=filled.row.id, trial=trial)
    status, answer = ask(app, method, where, body)
    assert status == 405 if guarded else status >= 400
    if guarded:
        assert answer == {"reason": "read-only: this is a view of apportion's studies"}
    assert ask(app, "GET", f"/api/studies/{filled.row.id}") == before
    assert [row.name for row in filled.store.studies()] == ["demo"]
