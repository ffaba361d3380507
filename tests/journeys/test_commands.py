"""Commands as a user types them: into a terminal and into a pipe; two studies in one home."""

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from apportion.studies.evopress.database import open_database
from apportion.studies.evopress.levels import parse_levels
from apportion.studies.evopress.text import content

Journey = Any
WIDTH = 80
LOOKING = {
    "list": ("list",),
    "status": ("status", "tiny"),
    "follow": ("status", "tiny", "--follow"),
    "show": ("show", "tiny"),
    "submit again": ("submit", "STUDY"),
    "resume": ("resume", "tiny"),
    "db check": ("db", "check"),
    "gc": ("gc", "--dry-run"),
}


def copy_of(journey: Journey, folder: Path) -> Journey:
    """A finished study in a home of its own, its files where they were."""
    shutil.copytree(journey.home, folder / "copied")
    return replace(journey, home=folder / "copied")


def named(journey: Journey, name: str, *edits: tuple[str, str]) -> Path:
    """The study's file under another name, with edits."""
    text = journey.study.read_text()
    for old, new in (('"tiny"', f'"{name}"'), *edits):
        assert text.count(old) == 1
        text = text.replace(old, new)
    file = journey.folder / f"{name}.toml"
    file.write_text(text)
    return file


@pytest.mark.parametrize("name", LOOKING)
def test_same_words_in_a_terminal_and_into_a_pipe(finished: Journey, name: str) -> None:
    words = [finished.study if word == "STUDY" else word for word in LOOKING[name]]
    piped = finished.piped(*words)
    assert (piped.status, piped.error, "\x1b" in piped.out) == (0, "", False)
    with finished.terminal(*words) as terminal:
        status, said = terminal.end()
    lines = [line.rpartition("\r")[2] for line in said.replace("\r\n", "\n").splitlines()]
    assert status == 0 and max(map(len, lines)) <= WIDTH
    first = piped.out.split()[:3]
    assert all(word in said for word in first)


def test_json_is_unbroken_on_a_terminal(finished: Journey) -> None:
    with finished.terminal("status", "tiny", "--json") as terminal:
        _, said = terminal.end()
    assert json.loads(said) == finished.status()


def test_submit_on_a_terminal(journey: Journey, finished: Journey) -> None:
    with journey.terminal("submit", journey.study) as terminal:
        status, said = terminal.end()
    assert status == 0 and "━" in said and "* chosen" in said
    assert journey.path() == finished.path()
    assert journey.nothing_left()


def test_ctrl_c_at_the_terminal_and_on(journey: Journey, finished: Journey) -> None:
    with journey.terminal("submit", journey.study) as terminal:
        journey.until(lambda: journey.evaluated() > 5)
        terminal.type("\x03")
        status, said = terminal.end()
    assert (status, said.splitlines()[-1]) == (130, " to go on: apportion resume tiny")
    assert journey.nothing_left()
    assert journey.piped("resume", "tiny").status == 0
    assert journey.path() == finished.path()


def test_closed_window_ends_a_study_that_goes_on(journey: Journey, finished: Journey) -> None:
    with journey.terminal("submit", journey.study) as terminal:
        journey.until(lambda: journey.evaluated() > 5)
        terminal.hang_up()
        assert journey.nothing_left()
    assert journey.listed()[0]["state"] == "interrupted"
    assert journey.piped("resume", "tiny").status == 0
    assert journey.path() == finished.path()


def test_reader_of_submit_that_leaves(journey: Journey, finished: Journey) -> None:
    line = '"$@" | head -1; exit ${PIPESTATUS[0]}'
    ended = journey.piped("submit", journey.study, before=("bash", "-c", line, "bash"))
    assert (ended.status, ended.error, ended.out.count("\n")) == (141, "", 1)
    assert journey.nothing_left()
    assert journey.listed()[0]["state"] == "interrupted"
    assert journey.piped("resume", "tiny").status == 0
    assert journey.path() == finished.path()


def test_other_name_costs_no_evaluation(finished: Journey, tmp_path: Path) -> None:
    twins = copy_of(finished, tmp_path)
    before, began = twins.evaluated(), time.monotonic()
    ended = twins.piped("submit", named(finished, "twin"))
    assert time.monotonic() - began < 10
    assert (ended.status, ended.error) == (0, "")
    status = twins.status("twin")
    assert (status["bill"], status["cached"] > 0, twins.evaluated()) == ({}, True, before)
    assert twins.path("twin") == finished.path()


def test_second_study_beside_the_first(journey: Journey, finished: Journey) -> None:
    second = named(journey, "second", ("offspring = 4", "offspring = 5"))
    with journey.process("submit", journey.study) as one, journey.process("submit", second) as two:
        for process in (one, two):
            _, error = process.communicate(timeout=120)
            assert (process.returncode, error) == (0, "")
    assert journey.path() == finished.path()
    assert journey.path("second")["trials"] != finished.path()["trials"]
    assert [row["state"] for row in journey.listed()] == ["finished", "finished"]
    assert journey.run("db", "check").status == 0
    assert journey.nothing_left()


def test_export_to_optuna_adds_what_is_new(finished: Journey, tmp_path: Path) -> None:
    trials = len(finished.path()["trials"])
    url = f"sqlite:///{tmp_path / 'optuna.db'}"
    first = finished.piped("export", "tiny", "--optuna", url)
    assert (first.status, first.error) == (0, "")
    assert first.out == f" exported  {trials} finished trials to {url}\n"
    with finished.terminal("export", "tiny", "--optuna", url) as terminal:
        status, said = terminal.end()
    assert status == 0 and " exported  0 finished trials to " in said


def test_export_to_evopress_is_what_its_scripts_read(finished: Journey, tmp_path: Path) -> None:
    report = json.loads(finished.run("show", "tiny", "--json").out)
    number = next(u["number"] for u in report["uniform"] if u["option"] == "w4g32")
    folder = tmp_path / "evopress"
    ended = finished.piped("export", "tiny", "--trial", number, "--evopress", folder)
    assert (ended.status, ended.error) == (0, "")
    levels = parse_levels(content(folder / "final_configuration.txt"), "it").levels
    assert set(levels.values()) == {"4"}
    database = open_database(folder)
    for module, level in levels.items():
        weight = database.tensor(module, level)
        groups = weight.reshape(-1, 32)
        assert max(len(group.unique()) for group in groups) <= 16
    again = finished.piped("export", "tiny", "--trial", number, "--evopress", folder)
    assert (again.status, "exists already" in again.error) == (2, True)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("export", "tiny"), "say where to: --to FOLDER"),
        (("export", "tiny", "--optuna", "trials.db"), "--optuna: no database address"),
        (("stop", "tiny"), 'study "tiny" is not being run'),
        (("stop", "tinny"), 'no study "tinny"'),
        (("delete", "tiny"), "--yes"),
    ],
)
def test_what_cannot_be_is_one_line(finished: Journey, words: tuple[str, ...], line: str) -> None:
    ended = finished.piped(*words)
    assert (ended.status, ended.out, len(ended.error.splitlines())) == (2, "", 1)
    assert line in ended.error
