"""The watch over memory, with processes that have some."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest

from apportion.workers.resident import ResidentWatch, private_bytes

MB = 10**6
HOLD = """
import mmap, sys
if sys.argv[1] == "own":
    held = b"x" * 200_000_000
else:
    file = open(sys.argv[1], "rb")
    held = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    sum(held[k] for k in range(0, len(held), mmap.PAGESIZE))
print("ready", flush=True)
sys.stdin.read()
"""


def holding(what: str) -> "subprocess.Popen[str]":
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, what],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.fixture
def watch() -> Iterator[ResidentWatch]:
    made = ResidentWatch(100 * MB)
    yield made
    made.close()


def test_process_beyond_its_share_is_killed(watch: ResidentWatch) -> None:
    with holding("own") as process:
        watched = psutil.Process(process.pid)
        watch.add(watched)
        assert process.wait(10) < 0
        assert watch.exceeded(watched)


def test_mapped_files_are_nobodys_memory(watch: ResidentWatch, tmp_path: Path) -> None:
    (tmp_path / "bank").write_bytes(b"x" * 200 * MB)
    with holding(str(tmp_path / "bank")) as process, holding("own") as other:
        watched = psutil.Process(process.pid)
        assert watched.memory_info().rss > 200 * MB > 100 * MB > private_bytes(watched)
        watch.add(watched)
        watch.add(psutil.Process(other.pid))
        other.wait(10)  # so the watch has looked
        assert process.poll() is None
        assert not watch.exceeded(watched)
        process.communicate("")


def test_removed_process_is_left_alone(watch: ResidentWatch) -> None:
    with holding("own") as process, holding("own") as other:
        removed = psutil.Process(process.pid)
        watch.add(removed)
        watch.remove(removed)
        watch.add(psutil.Process(other.pid))
        other.wait(10)
        assert process.poll() is None
        process.communicate("")
