"""A study from its submission to a verified artifact, as it is typed."""

import json
import re
import subprocess
from typing import Any

import pytest

Journey = Any


def test_submit_ends_with_a_front(finished: Journey) -> None:
    shown = finished.run("show", "tiny")
    assert shown.status == 0
    assert "front (limits: " in shown.out and "* chosen" in shown.out
    (row,) = finished.listed()
    assert (row["name"], row["state"]) == ("tiny", "finished")


def test_winner_keeps_the_limits(finished: Journey) -> None:
    report = json.loads(finished.run("show", "tiny", "--json").out)
    points = [*report["front"], *report["uniform"]]
    winner = next(point for point in report["front"] if point["number"] == report["winner"])
    dense = max(point["weight_bytes"] for point in points)
    assert winner["weight_bytes"] <= 0.4 * dense
    assert all(point["latency_ms"]["here"]["measured"] is None for point in points)


def test_status_says_finished(finished: Journey) -> None:
    assert "finished" in finished.run("status", "tiny").out
    status = json.loads(finished.run("status", "tiny", "--json").out)
    assert 0 < status["tokens_spent"] <= status["tokens"]


def test_submitted_again_starts_nothing(finished: Journey) -> None:
    before = finished.path()
    again = finished.submit()
    assert (again.status, again.error) == (0, "")
    assert "study tiny is finished already; nothing was started" in again.out
    assert finished.path() == before


def test_other_specification_of_the_same_name_is_refused(finished: Journey) -> None:
    other = finished.folder / "other.toml"
    text = finished.study.read_text().replace('"0.4x dense"', '"0.5x dense"')
    other.write_text(text.replace("offspring = 4", "offspring = 5"))
    ended = finished.run("submit", other)
    assert ended.status == 2
    assert 'limits.weight_bytes: "0.4x dense" -> "0.5x dense"' in ended.error
    assert "search.offspring: 4 -> 5" in ended.error and "choose another name" in ended.error


def test_resume_of_a_finished_study_does_nothing(finished: Journey) -> None:
    ended = finished.run("resume", "tiny")
    assert (ended.status, ended.error) == (0, "")
    assert "is finished; nothing is left to do" in ended.out


def test_unknown_study_names_the_home(finished: Journey) -> None:
    ended = finished.run("resume", "tinny")
    assert (ended.status, str(finished.home) in ended.error) == (2, True)


def test_export_and_verify(finished: Journey, tmp_path: Any) -> None:
    assert finished.run("export", "tiny", "--to", tmp_path / "winner").status == 0
    found = json.loads(finished.run("verify", tmp_path / "winner", "--json").out)
    assert found["ok"] and abs(found["loss_difference"]) < 1e-4
    again = finished.run("export", "tiny", "--to", tmp_path / "winner")
    assert (again.status, "exists already" in again.error) == (2, True)


def test_damaged_artifact_is_not_what_was_promised(finished: Journey, tmp_path: Any) -> None:
    finished.run("export", "tiny", "--to", tmp_path / "winner")
    (tensors,) = (tmp_path / "winner").glob("*.safetensors")
    content = bytearray(tensors.read_bytes())
    content[-2000:] = bytes(2000)
    tensors.write_bytes(content)
    ended = finished.run("verify", tmp_path / "winner")
    assert ended.status != 0 and len(ended.error.splitlines()) == 1


@pytest.mark.parametrize("columns", ["80", "200"])
def test_tables_fit_the_terminal(finished: Journey, columns: str) -> None:
    line = "stty cols " + columns + "; " + " ".join(finished.command("show", "tiny"))
    ended = subprocess.run(
        ["script", "-qec", line, "/dev/null"], capture_output=True, text=True, check=True
    )
    lines = [text.rstrip() for text in ended.stdout.splitlines()]
    assert max(len(_plain(text)) for text in lines) <= int(columns)


def _plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def test_reader_that_leaves_is_no_error(finished: Journey) -> None:
    line = " ".join(finished.command("show", "tiny")) + " | head -2; exit ${PIPESTATUS[0]}"
    ended = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False)
    assert ended.returncode in (0, 141)
    assert (len(ended.stdout.splitlines()), ended.stderr) == (2, "")
