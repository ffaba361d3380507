"""Ray's own troubles: errors that cross processes, and what a dead driver leaves behind."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from apportion.errors import InvalidInput
from apportion.workers.ray_pool import RayPool
from apportion.workers.spec import WorkerSpec
from apportion.workers.watchdog import marked

Descendants = Callable[[int], set[int]]


def test_ray_pool_tells_what_the_user_did_wrong(spec: WorkerSpec, descendants: Descendants) -> None:
    before = descendants(os.getpid())
    with pytest.raises(InvalidInput, match="model.source: no file"):
        RayPool(spec | {"source": "python:nothing.py:build"}, workers=1)
    assert descendants(os.getpid()) <= before


DRIVER = """
import json, sys, time
from apportion.workers.evaluator import Evaluate
from apportion.workers.ray_pool import RayPool
pool = RayPool(json.loads(sys.stdin.readline()), workers=1)
pool.submit(Evaluate({}, "search", 0, 4)).result(60)
print(pool._folder, flush=True)
time.sleep(3600)
"""


def test_killed_driver_leaves_no_process(
    spec: WorkerSpec, tmp_path: Path, descendants: Descendants
) -> None:
    driver = subprocess.Popen(
        [sys.executable, "-P", "-c", DRIVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=tmp_path,
        text=True,
    )
    assert driver.stdin is not None
    assert driver.stdout is not None
    driver.stdin.write(json.dumps(spec) + "\n")
    driver.stdin.flush()
    folder = Path(driver.stdout.readline().strip())
    assert folder.is_dir()
    ours = descendants(driver.pid)
    assert len(ours) >= 3
    assert len(ours - set(marked(str(folder)))) == 1  # the watchdog
    driver.kill()
    driver.communicate()
    deadline = time.monotonic() + 15
    left = [folder, *(Path(f"/proc/{pid}") for pid in ours)]
    while any(path.exists() for path in left) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [path for path in left if path.exists()]


# The evaluator is the script's own: a worker gets it with the work.
SLOW_DRIVER = """
import json, os, sys, time
from pathlib import Path
import numpy as np
from apportion.workers.evaluator import Evaluate, Evaluation
from apportion.workers.patience import Patience
from apportion.workers.ray_pool import RayPool

class Slow:
    def __init__(self, file):
        self.file = file
    def evaluate(self, work):
        self.file.write_text(f"{os.getpid()}\\n")
        for _ in range(20):
            time.sleep(0.1)
        return Evaluation(np.ones(4), np.ones(4), None, 2.0)

def build(spec):
    return Slow(Path(spec["base"]) / "pid").evaluate

patience = Patience(floor_seconds=5, first_seconds=5)
pool = RayPool(json.loads(sys.stdin.readline()), workers=1, build=build, patience=patience)
done = pool.submit(Evaluate({}, "search", 0, 4)).result(60)
print(done.failure, pool.recoveries, flush=True)
pool.close()
"""
STOPPED_SECONDS = 7.0


def test_driver_that_was_stopped_itself_kills_nobody(spec: WorkerSpec, tmp_path: Path) -> None:
    """As by Ctrl-Z: longer than the limit of an evaluation, which needs two seconds more."""
    driver = subprocess.Popen(
        [sys.executable, "-P", "-c", SLOW_DRIVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=tmp_path,
        text=True,
    )
    assert driver.stdin is not None
    driver.stdin.write(json.dumps(spec | {"base": str(tmp_path)}) + "\n")
    driver.stdin.flush()
    deadline = time.monotonic() + 60
    file = tmp_path / "pid"
    while not file.exists() or not file.read_text().endswith("\n"):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    both = int(file.read_text()), driver.pid
    for pid in both:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(STOPPED_SECONDS)
    for pid in both:
        os.kill(pid, signal.SIGCONT)
    out, _ = driver.communicate(timeout=60)
    assert (driver.returncode, out) == (0, "None 0\n")
