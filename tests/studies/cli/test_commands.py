"""The command line, in processes of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("torch", "ray", "optuna", "transformers")


def apportion(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"APPORTION_HOME": str(cwd / "home"), "COLUMNS": "80"}
    command = [sys.executable, "-m", "apportion", *words]
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize(
    "code",
    [
        "import apportion",
        "from apportion import StudySpec",
        "from apportion.studies.cli.app import run; from apportion.studies.cli.session import *;"
        "run(['--help'], Session())",
        "from apportion.studies.cli.app import run; from apportion.studies.cli.session import *;"
        "run(['list'], Session())",
    ],
    ids=["import", "StudySpec", "help", "list"],
)
def test_light_things_import_nothing_heavy(tmp_path: Path, code: str) -> None:
    code += f"\nimport sys; print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"APPORTION_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_version_and_help_succeed(tmp_path: Path) -> None:
    assert apportion("--version", cwd=tmp_path).stdout.startswith("apportion 0.")
    shown = apportion(cwd=tmp_path)
    assert shown.returncode == 0
    words = "init sites check submit resume stop status list show export verify delete gc db"
    for word in words.split():
        assert f"\n  {word} " in shown.stdout


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["submt"], "No such command 'submt'. Did you mean 'submit'?"),
        (["submit"], "Missing argument 'STUDY'"),
        (["submit", "no.toml"], "no.toml: no such file"),
        (["submit", "no.toml", "--workers", "0"], "--workers 0: must be at least 1"),
        (["submit", "no.toml", "--detach"], "no.toml: no such file"),
        (["submit", "no.toml", "--detached"], "No such option"),
        (["stop", "demo"], 'no study "demo" in'),
        (["resume", "demo", "--limit", "bits"], "--limit bits: write"),
        (["export", "demo"], "say where to: --to FOLDER"),
        (["check", "."], ".: is a folder"),
        (["sites", "python:x"], "names no function"),
        (["sites", "./none"], "./none: no folder"),
        (["init", "text:x"], "is no model"),
    ],
)
def test_wrong_input_is_one_line_and_two(tmp_path: Path, words: list[str], line: str) -> None:
    done = apportion(*words, cwd=tmp_path)
    assert done.returncode == 2
    assert line in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ""
    assert not (tmp_path / "home").exists()


def test_init_writes_once(tmp_path: Path) -> None:
    assert apportion("init", "hf:org/model", cwd=tmp_path).returncode == 0
    assert 'source = "hf:org/model"' in (tmp_path / "study.toml").read_text()
    again = apportion("init", "hf:org/model", cwd=tmp_path)
    assert (again.returncode, again.stderr.count("\n")) == (2, 1)
    assert "study.toml: is already there" in again.stderr


def test_broken_pipe_leaves_no_traceback(tmp_path: Path) -> None:
    script = f"{sys.executable} -m apportion init hf:org/model --to - | true"
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.stderr == ""


def test_list_of_an_empty_home(tmp_path: Path) -> None:
    shown = apportion("list", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert f"no studies in {tmp_path}" in shown.stdout
    assert json.loads(apportion("list", "--json", cwd=tmp_path).stdout) == []
