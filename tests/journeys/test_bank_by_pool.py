"""The bank of a study is filled by its workers: the same one, whatever becomes of them."""

import os
import signal
from pathlib import Path
from typing import Any

from apportion.spaces.bank import Bank

Journey = Any
LONGEST_S = 120.0


def entries(journey: Journey) -> dict[str, bytes]:
    """Key -> what its file holds."""
    found = (journey.home / "bank").glob("*/*.safetensors")
    return {file.stem: file.read_bytes() for file in found}


def written(journey: Journey, keys: list[str]) -> list[int]:
    bank = Bank(Path(journey.home) / "bank")
    return [bank.path(key).stat().st_mtime_ns for key in keys]


def test_two_workers_fill_the_bank_of_one(journey: Journey, finished: Journey) -> None:
    ended = journey.piped("submit", journey.study, "--workers", "2")
    assert (ended.status, ended.error) == (0, "")
    assert entries(journey) == entries(finished)
    assert journey.path() == finished.path()
    assert f"bank {len(entries(finished))} entries" in ended.out


def test_driver_killed_while_the_bank_is_filled(journey: Journey, finished: Journey) -> None:
    with journey.process("submit", journey.study, "--workers", "2") as process:
        journey.until(lambda: entries(journey))
        os.kill(process.pid, signal.SIGKILL)
    assert journey.nothing_left()
    left, whole = entries(journey), entries(finished)
    assert left.items() <= whole.items()
    before = written(journey, list(left))
    with journey.process("resume", "tiny") as process:
        _, error = process.communicate(timeout=LONGEST_S)
    assert (process.returncode, error) == (0, ""), error
    assert entries(journey) == whole
    assert written(journey, list(left)) == before
    assert journey.path() == finished.path()


def test_lost_entry_is_made_again_by_the_workers(journey: Journey, finished: Journey) -> None:
    with journey.process("submit", journey.study) as process:
        journey.until(lambda: journey.evaluated() > 5)
        os.killpg(process.pid, signal.SIGINT)
        process.communicate(timeout=LONGEST_S)
    keys = sorted(entries(journey))
    Bank(journey.home / "bank").path(keys[0]).unlink()
    before = written(journey, keys[1:])
    ended = journey.piped("resume", "tiny", "--workers", "2")
    assert (ended.status, ended.error) == (0, "")
    assert "they are made again" in ended.out
    assert entries(journey) == entries(finished)
    assert written(journey, keys[1:]) == before
