"""Whatever ends a driver or a worker, the study goes on to the same end, and nothing is left."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

Journey = Any
ROOT = Path(__file__).parents[2]
LONGEST_S = 120.0


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
    with journey.process("submit", journey.study, "--workers", "2") as process:
        journey.until(lambda: journey.evaluated() > 10)
        os.kill(process.pid, signal.SIGKILL)
    assert journey.nothing_left()
    with journey.process("resume", "tiny") as process:
        out, error = process.communicate(timeout=LONGEST_S)
    assert (process.returncode, error) == (0, ""), error
    assert "resuming at search" in out
    assert journey.path() == finished.path()
    assert journey.nothing_left()


def test_worker_killed(journey: Journey, finished: Journey) -> None:
    with journey.process("submit", journey.study, "--workers", "2") as process:
        journey.until(lambda: journey.evaluated() > 5)
        workers = [p for p in journey.processes() if "EvaluatorActor" in " ".join(p.cmdline())]
        assert len(workers) == 2
        workers[0].kill()
        _, error = process.communicate(timeout=LONGEST_S)
    assert (process.returncode, error) == (0, ""), error
    assert journey.path() == finished.path()
    assert json.loads(journey.run("status", "tiny", "--json").out)["recoveries"] == 1
    assert journey.nothing_left()


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
    journey.slowed(0.2)
    with journey.process("submit", journey.study) as process:
        journey.until(lambda: journey.evaluated() > 3)
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
        with journey.process("resume", "tiny") as third:
            journey.until(lambda: journey.listed()[0]["state"] == "running")
        assert time.monotonic() - began < 20 and third.returncode != 2


@pytest.mark.parametrize("workers", [1, 2])
def test_interrupted_study_goes_on(journey: Journey, finished: Journey, workers: int) -> None:
    with journey.process("submit", journey.study, "--workers", workers) as process:
        journey.until(lambda: journey.evaluated() > 10)
        os.killpg(process.pid, signal.SIGINT)
        out, error = process.communicate(timeout=LONGEST_S)
    assert (process.returncode, error) == (130, ""), error
    assert out.splitlines()[-1] == " to go on: apportion resume tiny"
    assert journey.nothing_left()
    assert journey.listed()[0]["state"] == "interrupted"
    assert journey.run("resume", "tiny").status == 0
    assert journey.path() == finished.path()


def test_second_interrupt_ends_at_once(journey: Journey) -> None:
    journey.slowed(4.0)
    with journey.process("submit", journey.study) as process:
        journey.until(lambda: journey.evaluated() > 0)
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
    assert journey.nothing_left()
