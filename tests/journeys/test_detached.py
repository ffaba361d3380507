"""A study that runs by itself: submitted, watched, stopped, taken over."""

import json
import os
import signal
import sqlite3
import time
from contextlib import closing
from typing import Any

import psutil
import pytest

Journey = Any
RESUME = " to go on: apportion resume tiny"


def hold(journey: Journey) -> None:
    """Wait until the study searches, and slow it down."""
    journey.until(lambda: journey.evaluated() > 5)
    (journey.folder / "slow").touch()


def go_on(journey: Journey) -> None:
    (journey.folder / "slow").unlink()


def stopped_outside_of_a_write(journey: Journey, pid: int) -> bool:
    """Stop a process; let it go on where it keeps the database's file locked."""
    os.kill(pid, signal.SIGSTOP)
    journey.until(lambda: psutil.Process(pid).status() == psutil.STATUS_STOPPED)
    with closing(sqlite3.connect(journey.home / "studies.db", timeout=0)) as connection:
        try:
            connection.execute("begin immediate")
        except sqlite3.OperationalError:
            os.kill(pid, signal.SIGCONT)
            return False
    return True


def state(journey: Journey) -> str:
    return str(journey.listed()[0]["state"])


def test_detached_study_outlives_its_terminal(slow: Journey, finished: Journey) -> None:
    with slow.terminal("submit", slow.study, "--detach") as terminal:
        status, said = terminal.end()
        (process,) = slow.processes()
        hold(slow)
        terminal.hang_up()
    assert status == 0
    shown = [" ".join(line.split()) for line in said.splitlines()]
    assert shown == [
        "submitted tiny",
        "watch apportion status tiny --follow",
        "stop apportion stop tiny",
        "resume apportion resume tiny",
        "front apportion show tiny",
        "export apportion export tiny --to winner/",
    ]
    assert process.terminal() is None and os.getsid(process.pid) == process.pid
    go_on(slow)
    slow.until(lambda: state(slow) != "running")
    assert slow.nothing_left()
    assert slow.path() == finished.path()
    assert "* chosen" in (slow.home / "logs" / "tiny.out.log").read_text()


def test_hangup_of_the_shell_that_submitted(slow: Journey, finished: Journey) -> None:
    # a shell that stays: whoever is left in its session is sent SIGHUP
    line = '"$@"; exec cat'
    shell = ("sh", "-c", line, "sh")
    with slow.terminal("submit", slow.study, "--detach", before=shell) as terminal:
        terminal.wait_for("--to winner/")
        hold(slow)
        terminal.hang_up()
        terminal.process.wait(20)
    go_on(slow)
    slow.until(lambda: state(slow) == "finished")
    assert slow.path() == finished.path()


def test_detached_into_a_pipe_lets_it_go(journey: Journey, finished: Journey) -> None:
    ended = journey.piped("submit", journey.study, "--detach")  # returns: nobody holds the pipe
    assert (ended.status, ended.error, ended.out.count("\n")) == (0, "", 6)
    journey.until(lambda: state(journey) == "finished")
    again = journey.piped("submit", journey.study, "--detach")
    assert (again.status, again.error) == (0, "")
    assert again.out == " study tiny is finished already; nothing was started\n"
    assert journey.path() == finished.path()


def test_stop_stores_what_runs(slow: Journey, finished: Journey) -> None:
    with slow.process("submit", slow.study) as process:
        hold(slow)
        ended = slow.piped("stop", "tiny")
        out, error = process.communicate(timeout=20)
    assert (ended.status, ended.error) == (0, "")
    asked = " stopping tiny: what runs comes to its end"
    assert ended.out.splitlines() == [asked, " tiny is interrupted", RESUME]
    assert (process.returncode, error, out.splitlines()[-1]) == (130, "", RESUME)
    status = slow.status()
    assert (status["state"], status["wasted_seconds"]) == ("interrupted", 0)
    assert status["bill"]["done"]["executions"] == slow.evaluated()
    go_on(slow)
    assert slow.piped("resume", "tiny").status == 0
    assert slow.path() == finished.path()
    assert slow.status()["bill"]["done"]["executions"] == slow.evaluated() == finished.evaluated()


@pytest.mark.parametrize("workers", [1, 2])
def test_stop_now_gives_up_what_runs(journey: Journey, finished: Journey, workers: int) -> None:
    journey.slowed(15.0)
    with journey.process("submit", journey.study, "--workers", workers) as process:
        hold(journey)
        with journey.terminal("stop", "tiny", "--now") as terminal:
            terminal.wait_for(" stopping tiny")
            began = time.monotonic()
            status, said = terminal.end()
        out, error = process.communicate(timeout=20)
    assert time.monotonic() - began < 8
    assert (status, said.splitlines()[-1]) == (0, RESUME)
    assert (process.returncode, error, out.splitlines()[-1]) == (130, "", RESUME)
    assert journey.nothing_left()
    assert state(journey) == "interrupted"
    go_on(journey)
    assert journey.piped("resume", "tiny").status == 0
    assert journey.path() == finished.path()


def test_follow_to_the_end_in_pipe_and_terminal(slow: Journey) -> None:
    assert slow.piped("submit", slow.study, "--detach").status == 0
    hold(slow)
    with slow.process("status", "tiny", "--follow", "--json") as pipe:
        first = json.loads(pipe.stdout.readline())
        slow.until(lambda: (slow.status()["seconds_left"] or 0.0) > 0.0)
        with slow.terminal("status", "tiny", "--follow") as terminal:
            terminal.wait_for("running: search")
            terminal.type("\x03")
            status, said = terminal.end()
        assert (status, "interrupted" in said, state(slow)) == (130, True, "running")
        with slow.terminal("status", "tiny", "--follow") as terminal:
            terminal.wait_for("running: search")
            go_on(slow)
            status, said = terminal.end()
        out, error = pipe.communicate(timeout=60)
    assert (status, pipe.returncode, error) == (0, 0, "")
    assert said.splitlines()[-1].startswith(" finished · ")
    last = json.loads(out.splitlines()[-1])
    assert first["state"] == "running"
    assert (last["state"], last["seconds_left"]) == ("finished", None)


def test_taken_over_from_a_driver_that_is_stuck(slow: Journey, finished: Journey) -> None:
    with slow.process("submit", slow.study) as stuck:
        hold(slow)
        slow.until(lambda: stopped_outside_of_a_write(slow, stuck.pid))
        go_on(slow)
        refused = slow.piped("resume", "tiny")
        assert (refused.status, refused.error.count("\n")) == (2, 1)
        assert f"pid {stuck.pid} on" in refused.error and "--take-over" in refused.error
        taken = slow.piped("resume", "tiny", "--take-over")
        assert (taken.status, taken.error) == (0, "")
        before = slow.path(), slow.evaluated(), slow.status()
        os.kill(stuck.pid, signal.SIGCONT)
        _, error = stuck.communicate(timeout=60)
    assert (stuck.returncode, error.count("\n")) == (1, 1)
    assert "no longer run by this process; nothing was written" in error
    assert (slow.path(), slow.evaluated(), slow.status()) == before
    assert slow.path() == finished.path()
