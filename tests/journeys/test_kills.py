"""Whatever ends a driver or a worker, the study goes on to the same end, and nothing is left."""

import errno
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

Journey = Any
ROOT = Path(__file__).parents[2]
LONGEST_S = 120.0


def evaluated(journey: Journey) -> int:
    """Evaluations that are stored."""
    file = journey.home / "studies.db"
    if not file.is_file():
        return 0
    with closing(sqlite3.connect(file)) as connection, suppress(sqlite3.OperationalError):
        return int(connection.execute("select count(*) from evaluations").fetchone()[0])
    return 0


def processes_of(journey: Journey) -> list[psutil.Process]:
    """Processes that name the study's home or descend from one that did."""
    mark = f"APPORTION_HOME={journey.home}"
    return [p for p in psutil.process_iter() if mark in _environment(p)]


def _environment(process: psutil.Process) -> list[str]:
    try:
        return [f"{name}={value}" for name, value in process.environ().items()]
    except (psutil.NoSuchProcess, psutil.AccessDenied, OSError):
        return []


@contextmanager
def driver(journey: Journey, *words: object) -> Iterator["subprocess.Popen[str]"]:
    """A command in a process group of its own; it is ended with its group."""
    process = subprocess.Popen(
        [sys.executable, "-m", "apportion", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"APPORTION_HOME": str(journey.home)},
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def until(condition: Any) -> Any:
    """Wait until something holds."""
    deadline = time.monotonic() + LONGEST_S
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.02)
    raise AssertionError("waited in vain")


def nothing_left(journey: Journey) -> bool:
    return until(lambda: not processes_of(journey)) is True


def slowed(journey: Journey, seconds: float) -> None:
    """From when the file `slow` is there, each forward pass takes so much longer."""
    old = "    def forward(self, x: Tensor) -> Tensor:\n        for block"
    head = old.rpartition("        for")[0]
    slow = "Path(__file__).with_name('slow').exists()"
    new = f"{head}        time.sleep({seconds} if {slow} else 0)\n        for block"
    journey.edit("model.py", old, new)
    journey.edit(
        "model.py", "import torch\n", "import time\nfrom pathlib import Path\n\nimport torch\n"
    )


def test_killed_at_commits_and_moments(tmp_path: Path) -> None:
    script, results = ROOT / "benchmarks" / "kill_everywhere.py", tmp_path / "results.json"
    words = ["--folder", tmp_path, "--results", results, "--every", "29", "--moments", "2"]
    ended = subprocess.run(
        [sys.executable, script, *map(str, words)], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    rows = json.loads(results.read_text())["rows"]
    assert len(rows) > 10 and all(row["identical"] for row in rows)


def test_driver_killed_with_workers(journey: Journey, finished: Journey) -> None:
    with driver(journey, "submit", journey.study, "--workers", "2") as process:
        until(lambda: evaluated(journey) > 10)
        os.kill(process.pid, signal.SIGKILL)
    assert nothing_left(journey)
    with driver(journey, "resume", "tiny") as process:
        out, error = process.communicate(timeout=LONGEST_S)
    assert (process.returncode, error) == (0, ""), error
    assert "resuming at search" in out
    assert journey.path() == finished.path()
    assert nothing_left(journey)


def test_worker_killed(journey: Journey, finished: Journey) -> None:
    with driver(journey, "submit", journey.study, "--workers", "2") as process:
        until(lambda: evaluated(journey) > 5)
        workers = [p for p in processes_of(journey) if "EvaluatorActor" in " ".join(p.cmdline())]
        assert len(workers) == 2
        workers[0].kill()
        _, error = process.communicate(timeout=LONGEST_S)
    assert (process.returncode, error) == (0, ""), error
    assert journey.path() == finished.path()
    assert json.loads(journey.run("status", "tiny", "--json").out)["recoveries"] == 1
    assert nothing_left(journey)


def test_full_disk_is_one_line_and_goes_on(
    journey: Journey, finished: Journey, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        ended = journey.submit()
    assert (ended.status, len(ended.error.splitlines())) == (1, 1)
    assert "the disk is full; free some space, then resume" in ended.error
    assert not list(journey.home.rglob("*.part"))
    assert journey.run("resume", "tiny").status == 0
    assert journey.path() == finished.path()


def test_running_study_has_one_driver(journey: Journey) -> None:
    slowed(journey, 0.2)
    with driver(journey, "submit", journey.study) as process:
        until(lambda: evaluated(journey) > 3)
        (journey.folder / "slow").touch()
        second = journey.run("resume", "tiny")
        assert (second.status, len(second.error.splitlines())) == (2, 1)
        assert f"is being run by pid {process.pid} on" in second.error
        again = journey.submit()
        assert (again.status, "is running already; nothing was started" in again.out) == (0, True)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert journey.listed()[0]["state"] == "interrupted"
        began = time.monotonic()
        with driver(journey, "resume", "tiny") as third:
            until(lambda: journey.listed()[0]["state"] == "running")
        assert time.monotonic() - began < 20 and third.returncode != 2


@pytest.mark.parametrize("workers", [1, 2])
def test_interrupted_study_goes_on(journey: Journey, finished: Journey, workers: int) -> None:
    with driver(journey, "submit", journey.study, "--workers", workers) as process:
        until(lambda: evaluated(journey) > 10)
        os.killpg(process.pid, signal.SIGINT)
        out, error = process.communicate(timeout=LONGEST_S)
    assert (process.returncode, error) == (130, ""), error
    assert out.splitlines()[-1] == " to go on: apportion resume tiny"
    assert nothing_left(journey)
    assert journey.listed()[0]["state"] == "interrupted"
    assert journey.run("resume", "tiny").status == 0
    assert journey.path() == finished.path()


def test_second_interrupt_ends_at_once(journey: Journey) -> None:
    slowed(journey, 4.0)
    with driver(journey, "submit", journey.study) as process:
        until(lambda: evaluated(journey) > 0)
        (journey.folder / "slow").touch()
        time.sleep(0.5)
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(0.3)
        began = time.monotonic()
        os.killpg(process.pid, signal.SIGINT)
        out, error = process.communicate(timeout=LONGEST_S)
    assert (process.returncode, error) == (130, ""), error
    assert time.monotonic() - began < 3.5
    assert out.splitlines()[-1] == " to go on: apportion resume tiny"
    assert nothing_left(journey)
