"""A store on each engine, on real servers, and processes of its own to be stopped and killed."""

import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy import make_url

from apportion.hashing import content_hash
from apportion.studies.database import Layout, Lease, NewTrial, Store

FIXTURES = Path(__file__).parent / "fixtures"
Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "studies.db"


@pytest.fixture(params=["sqlite", "postgresql"])
def address(request: pytest.FixtureRequest) -> str:
    """Where an empty database is."""
    name = "path" if request.param == "sqlite" else "postgresql_address"
    return str(request.getfixturevalue(name))


@pytest.fixture
def store(address: str) -> Iterator[Store]:
    store = Store.open(address)
    yield store
    store.close()


@pytest.fixture
def lease(store: Store) -> Lease:
    return store.acquire(store.create_study("demo", {}, "hash").id, 60)


@pytest.fixture
def database_of(request: pytest.FixtureRequest, address: str) -> Callable[[str], None]:
    """database_of(revision): there is a database of that revision at `address`."""

    def load(revision: str) -> None:
        kind = "postgresql" if "://" in address else "sqlite"
        sql = (FIXTURES / f"{revision}.{kind}.sql").read_text()
        if kind == "postgresql":
            server = request.getfixturevalue("postgresql")
            server.sql(sql, make_url(address).database)
            return
        with closing(sqlite3.connect(address)) as connection:
            connection.executescript(f"PRAGMA journal_mode = WAL; {sql}")

    return load


@pytest.fixture(scope="session")
def layout() -> Layout:
    return Layout({"b.site": ["dense", "w4g64"], "a.site": ["dense"]}, ["bytes"])


@pytest.fixture(scope="session")
def key() -> Callable[[str], str]:
    """key(name): the key of an evaluation."""
    return content_hash


@pytest.fixture(scope="session")
def new_trial(key: Callable[[str], str]) -> Callable[[str], NewTrial]:
    def make(name: str) -> NewTrial:
        return NewTrial(
            configuration={"b.site": "w4g64", "a.site": "dense"},
            first_window=2,
            windows=8,
            part="search",
            origin="greedy",
            costs={"bytes": 0.1 + 0.2},
            evaluation_key=key(name),
        )

    return make


@pytest.fixture(scope="session")
def until() -> Callable[[Callable[[], object]], None]:
    """until(condition): ask until it is so."""

    def wait(condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.01)

    return wait


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
