"""A study looked after: collected around, checked, deleted, submitted again."""

import json
import shutil
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

Journey = Any


@pytest.fixture
def copied(finished: Journey, tmp_path: Path) -> Journey:
    """The finished study in a home of its own."""
    shutil.copytree(finished.home, tmp_path / "home")
    return replace(finished, home=tmp_path / "home")


def entries(journey: Journey) -> list[Path]:
    return list((journey.home / "bank").rglob("*.safetensors"))


def test_finished_study_is_whole(copied: Journey) -> None:
    checked = json.loads(copied.run("db", "check", "--json").out)
    trials = len(copied.path()["trials"])
    assert (checked["studies"], checked["trials"], checked["problems"]) == (1, trials, [])
    assert checked["evaluations"] >= trials > 0
    assert checked["entries"] == len(entries(copied)) > 0


def test_gc_takes_nothing_that_a_finished_study_needs(copied: Journey, tmp_path: Path) -> None:
    before = copied.path()
    removed = json.loads(copied.run("gc", "--json").out)["removed"]
    assert set(removed) == {"cache"}
    assert copied.path() == before
    assert copied.run("export", "tiny", "--to", tmp_path / "winner").status == 0
    assert copied.run("db", "check").status == 0


def test_deleted_study_can_be_submitted_again(copied: Journey) -> None:
    before = copied.path()
    assert copied.run("delete", "tiny", "--yes").status == 0
    assert (copied.listed(), entries(copied)) == ([], [])
    assert json.loads(copied.run("gc", "--dry-run", "--json").out)["removed"].keys() <= {"cache"}
    assert copied.submit().status == 0
    assert copied.path() == before


def test_gc_beside_a_running_study_takes_nothing_of_it(journey: Journey, finished: Journey) -> None:
    process = subprocess.Popen(journey.command("submit", journey.study), stdout=subprocess.DEVNULL)
    try:
        collected = 0
        while process.poll() is None:
            if (journey.home / "studies.db").is_file():
                left = json.loads(journey.run("gc", "--json").out)["left"]
                collected += any('"tiny" is being run by pid' in line for line in left)
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
    assert (process.returncode, collected > 0) == (0, True)
    assert journey.run("db", "check").status == 0
    assert journey.path() == finished.path()
