"""Timing in a child process: results, messages, errors, and its end with its parent."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from apportion.errors import InvalidInput
from apportion.workers.spec import WorkerSpec
from apportion.workers.timing import run_timing

PREFILL = [{"phase": "prefill", "batch": 1, "tokens": 16, "context": None, "count": 1}]
DOWN = "model.layers.1.mlp.down_proj"


def comparison(spec: WorkerSpec) -> dict[str, Any]:
    chosen = {
        "configuration": {DOWN: "bf16", "model.layers.0": "drop"},
        "implementations": {DOWN: {"bf16": "linear.bf16"}},
    }
    return {
        "kind": "compare",
        "worker": spec,
        "request": PREFILL,
        "seconds": 0.1,
        "seed": 0,
        "configurations": {"chosen": chosen},
    }


def test_comparison_times_configurations_beside_dense(spec: WorkerSpec) -> None:
    result = run_timing(comparison(spec), 1, lambda message: None)
    assert set(result) == {"chosen"}
    assert 0 < result["chosen"]["ratio"] < 2


def test_wrong_job_is_told_as_in_this_process(spec: WorkerSpec) -> None:
    wrong = comparison(spec | {"source": "python:nothing.py:build"})
    with pytest.raises(InvalidInput, match="model.source: no file"):
        run_timing(wrong, 1, lambda message: None)


def test_profile_ends_when_the_listener_raises(
    spec: WorkerSpec, descendants: Callable[[int], set[int]]
) -> None:
    messages: list[dict[str, Any]] = []
    before = descendants(os.getpid())

    def listen(message: dict[str, Any]) -> None:
        messages.append(message)
        if len(messages) == 2:
            raise KeyboardInterrupt

    job = {"kind": "profile", "worker": spec, "request": PREFILL, "known": {}, "seed": 0}
    with pytest.raises(KeyboardInterrupt):
        run_timing(job, 1, listen)
    assert messages[0].keys() == {"record"}
    assert descendants(os.getpid()) <= before


def test_child_dies_with_its_parent(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-P', '-m', 'apportion.workers.timing'],\n"
        "                         stdin=subprocess.PIPE)\n"
        "print(child.pid, flush=True); time.sleep(3600)"
    )
    parent = subprocess.Popen([sys.executable, "-P", "-c", code], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    child = Path(f"/proc/{int(parent.stdout.readline())}")
    parent.kill()
    parent.communicate()
    deadline = time.monotonic() + 10
    while child.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not child.exists()
