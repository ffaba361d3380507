"""status --follow, while another process runs the study: here this one."""

import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from apportion.studies.database import Lease, Store
from apportion.studies.home import Home
from apportion.studies.specification import StudySpec


class Driver:
    """What a driver tells the database of a study "demo"."""

    def __init__(self, home: Home, store: Store) -> None:
        spec = StudySpec(
            study={"name": "demo"},
            model={"source": "hf:o/m"},
            data={"source": "text:/corpus", "context": 8},
            limits={"bits": 3.5},
        )
        self.home, self.store = home, store
        study = store.create_study("demo", spec.to_json(), spec.spec_hash)
        self.lease: Lease = store.acquire(study.id, 60)
        self.say("search", 1000)

    def say(self, stage: str, tokens: int) -> None:
        message = json.dumps({"tokens": tokens, "workers": 2})
        self.store.set_state(self.lease, "running", stage, message)

    def end(self, state: str) -> None:
        self.store.set_state(self.lease, state, "search", "{}")
        self.store.release(self.lease)

    def follow(self, *words: str, stdout: int = subprocess.PIPE) -> subprocess.Popen[str]:
        line = [sys.executable, "-m", "apportion", "--home", str(self.home.path)]
        return subprocess.Popen(
            [*line, "status", "demo", "--follow", *words],
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
        )


@pytest.fixture
def driver(tmp_path: Path) -> Iterator[Driver]:
    home = Home(tmp_path / "home").create()
    store = Store.open(home.database)
    yield Driver(home, store)
    store.close()


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def test_a_line_for_each_change_until_the_end(driver: Driver) -> None:
    process = driver.follow()
    assert first_line(process).startswith(" running: search · 1,000 of ")
    driver.say("confirm", 1000)
    assert first_line(process).startswith(" running: confirm · ")
    driver.end("done")
    out, error = process.communicate(timeout=60)
    assert (process.returncode, error, out.count("\n")) == (0, "", 1)
    assert out.startswith(" finished")


def test_nothing_new_says_nothing(driver: Driver) -> None:
    process = driver.follow()
    first_line(process)
    time.sleep(3.5)
    driver.end("done")
    out, _ = process.communicate(timeout=60)
    assert out.count("\n") == 1


@pytest.mark.parametrize(
    ("state", "status", "last"),
    [
        ("done", 0, " finished"),
        ("failed", 1, " failed"),
        ("stopped", 0, " to go on: apportion --home HOME resume demo"),
    ],
)
def test_status_and_last_line_say_how_it_ended(
    driver: Driver, state: str, status: int, last: str
) -> None:
    process = driver.follow()
    first_line(process)
    driver.end(state)
    out, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (status, "")
    assert out.splitlines()[-1].startswith(last.replace("HOME", str(driver.home.path)))


def test_json_is_a_record_a_line(driver: Driver) -> None:
    process = driver.follow("--json")
    lines = [first_line(process)]
    time.sleep(2.1)
    driver.say("search", 2000)
    lines.append(first_line(process))
    driver.end("done")
    out, _ = process.communicate(timeout=60)
    records = [json.loads(line) for line in [*lines, *out.splitlines()]]
    assert [record["tokens_spent"] for record in records] == [1000, 2000, 0]
    assert [record["state"] for record in records] == ["running", "running", "finished"]


def test_ctrl_c_leaves_the_study_alone(driver: Driver) -> None:
    process = driver.follow()
    first_line(process)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (130, "interrupted\n")
    (study,) = driver.store.studies()
    assert (study.state, study.stop, study.is_owned) == ("running", None, True)


def test_reader_that_leaves_ends_it_quietly(driver: Driver) -> None:
    process = driver.follow()
    first_line(process)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.wait(timeout=10) == 141
    assert process.stderr.read() == ""
    process.stderr.close()


def test_one_line_that_changes_on_a_terminal(driver: Driver) -> None:
    ours, theirs = pty.openpty()
    process = driver.follow(stdout=theirs)
    os.close(theirs)
    said = b""
    while b"running: search" not in said:
        said += os.read(ours, 4096)
    driver.end("done")
    try:
        while part := os.read(ours, 4096):
            said += part
    except OSError:
        pass  # how a terminal says that nobody is left at its other end
    os.close(ours)
    _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (0, "")
    assert said.count(b" finished") == 1
