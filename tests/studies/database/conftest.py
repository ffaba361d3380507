"""A store in a real file, and processes of its own to be killed."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from apportion.studies.database import Lease, NewTrial, Store

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "studies.db"


@pytest.fixture
def store(path: Path) -> Iterator[Store]:
    store = Store.open(path)
    yield store
    store.close()


@pytest.fixture
def lease(store: Store) -> Lease:
    return store.acquire(store.create_study("demo", {}, "hash").id, 60)


@pytest.fixture
def new_trial() -> Callable[[str], NewTrial]:
    def make(key: str) -> NewTrial:
        return NewTrial(
            configuration={"b.site": "w4g64", "a.site": "dense"},
            first_window=2,
            windows=8,
            part="search",
            origin="greedy",
            costs={"bytes": 0.1 + 0.2},
            evaluation_key=key,
        )

    return make


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """start(code, *arguments): runs Python code in a process of its own, its pipes open."""
    processes = []

    def run(code: str, *arguments: object) -> subprocess.Popen[str]:
        command = [sys.executable, "-P", "-c", code, *map(str, arguments)]
        pipe = subprocess.PIPE
        process = subprocess.Popen(
            command, cwd=tmp_path, stdin=pipe, stdout=pipe, stderr=pipe, text=True
        )
        processes.append(process)
        return process

    yield run
    for process in processes:
        process.kill()
        process.communicate()
