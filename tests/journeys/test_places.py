"""A disk that is full, a home that cannot be written, a database of the future."""

import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

Journey = Any
Inside = tuple[str, ...]
"""Words before a command that see a mount which nobody else does."""
SMALL = 'mount -t tmpfs -o size=8m tmpfs "$1"'
READ_ONLY = 'mount --bind "$1" "$1" && mount -o remount,ro,bind "$1"'
COUNT = """
import sqlite3, sys
database = sqlite3.connect(sys.argv[1], uri=True)
print(*database.execute("select count(*) from evaluations").fetchone())
"""
STORED = {
    "list": ("list",),
    "status": ("status", "tiny"),
    "show": ("show", "tiny"),
    "resume": ("resume", "tiny", "--tokens", "300"),
    "export": ("export", "tiny", "--to", "WINNER"),
    "delete": ("delete", "tiny", "--yes"),
    "gc": ("gc",),
    "stop": ("stop", "tiny"),
    "db check": ("db", "check"),
    "submit": ("submit", "STUDY"),
}


@contextmanager
def mounted(how: str, folder: Path) -> Iterator[Inside]:
    """A mount in a name space of its own, which ends with the block; skips where it may not be."""
    try:
        holder = subprocess.Popen(
            ["unshare", "-m", "sh", "-c", f"{how} && echo ready && exec cat", "sh", str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    except FileNotFoundError:
        pytest.skip("unshare is not installed (Debian: util-linux)")
    assert holder.stdout is not None and holder.stderr is not None
    try:
        if holder.stdout.readline() != "ready\n":
            pytest.skip(f"no mounts here: {holder.stderr.readline().strip()}")
        yield ("nsenter", "-t", str(holder.pid), "-m")
    finally:
        holder.communicate()


def inside(words: Inside, script: str, *arguments: object) -> None:
    line = [*words, "sh", "-c", script, "sh", *map(str, arguments)]
    subprocess.run(line, check=True, stderr=subprocess.DEVNULL)


def evaluated(words: Inside, home: Path) -> int:
    """Evaluations that are stored there by now."""
    line = [*words, sys.executable, "-c", COUNT, f"file:{home}/studies.db?mode=ro"]
    done = subprocess.run(line, capture_output=True, text=True)
    return int(done.stdout or 0)


@pytest.fixture
def copied(finished: Journey, tmp_path: Path) -> Journey:
    """The finished study in a home of its own."""
    shutil.copytree(finished.home, tmp_path / "home")
    return replace(finished, home=tmp_path / "home")


def words_of(name: str, journey: Journey, folder: Path) -> list[object]:
    known = {"WINNER": folder / "winner", "STUDY": journey.study}
    return [known.get(word, word) for word in STORED[name]]


def test_disk_that_fills_up_loses_nothing(
    journey: Journey, finished: Journey, tmp_path: Path
) -> None:
    journey.home.mkdir()
    journey.slowed(0.2)
    with mounted(SMALL, journey.home) as small:
        with journey.process("submit", journey.study, before=small) as process:
            journey.until(lambda: evaluated(small, journey.home) > 5)
            (journey.folder / "slow").touch()
            inside(small, 'cat /dev/zero > "$1/filler"; true', journey.home)
            (journey.folder / "slow").unlink()
            _, error = process.communicate(timeout=120)
        assert (process.returncode, error.count("\n")) == (1, 1), error
        assert "the disk is full; free some space, then resume" in error
        again = journey.piped("resume", "tiny", before=small)
        assert (again.status, again.error.count("\n")) == (1, 1), again.error
        assert "disk is full" in again.error
        inside(small, 'rm "$1/filler"', journey.home)
        ended = journey.piped("resume", "tiny", before=small)
        assert (ended.status, ended.error) == (0, "")
        inside(small, 'cp -r "$1" "$2"', journey.home, tmp_path / "kept")
    kept = replace(journey, home=tmp_path / "kept")
    assert kept.path() == finished.path()
    assert kept.evaluated() == finished.evaluated()
    assert kept.run("db", "check").status == 0
    assert not list(kept.home.rglob("*.part"))


@pytest.mark.parametrize("name", STORED)
def test_home_that_cannot_be_written(copied: Journey, tmp_path: Path, name: str) -> None:
    words = words_of(name, copied, tmp_path)
    with mounted(READ_ONLY, copied.home) as before:
        ended = copied.piped(*words, before=before)
    assert (ended.status, ended.out, ended.error.count("\n")) == (2, "", 1)
    assert str(copied.home) in ended.error
    assert "the folder must be writable" in ended.error or "choose another folder" in ended.error


@pytest.mark.parametrize("name", STORED)
def test_database_of_the_future(copied: Journey, tmp_path: Path, name: str) -> None:
    with closing(sqlite3.connect(copied.home / "studies.db")) as connection:
        connection.execute("update apportion_revision set version_num = '9999'")
        connection.commit()
    ended = copied.run(*words_of(name, copied, tmp_path))
    assert (ended.status, ended.out, ended.error.count("\n")) == (2, "", 1)
    assert "needs an apportion that knows revision 9999" in ended.error
    assert "upgrade apportion, or name another database" in ended.error
