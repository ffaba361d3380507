"""Keeps the checkout's root off `sys.path`; a PostgreSQL server for whoever asks for one."""

import importlib.util
import itertools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import settings

# Machines are shared: how long an example takes says nothing.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

ROOT = Path(__file__).resolve().parent.parent
# its folders must never shadow installed packages
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]

NUMBERS = itertools.count()
# Its input ends when the tests' process does, even by SIGKILL; at an orderly end nothing is left.
WATCH = """
cat > /dev/null
[ -d "$0" ] && kill -9 "$(head -n 1 "$0/data/postmaster.pid")"
rm -rf "$0"
"""


@pytest.fixture(scope="session")
def postgresql() -> Iterator[Any]:
    """A running `PostgreSQLServer` of this process's own; who stops it starts it again."""
    module = _server_module()
    if module.programs() is None:
        pytest.skip("PostgreSQL's server programs are not installed (Debian: postgresql)")
    server = module.PostgreSQLServer(synchronous=False)
    # a session of its own: Ctrl-C at the terminal must not end it before the tests
    watch = subprocess.Popen(
        ["sh", "-c", WATCH, server.folder],
        stdin=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        server.start()
        yield server
    finally:
        server.remove()
        watch.communicate()


@pytest.fixture
def postgresql_address(postgresql: Any) -> Iterator[str]:
    """The address of a new, empty database."""
    name = f"test_{next(NUMBERS)}"
    postgresql.sql(f"CREATE DATABASE {name}")
    yield postgresql.url(name)
    postgresql.sql(f"DROP DATABASE {name} WITH (FORCE)")


def _server_module() -> ModuleType:
    path = ROOT / "benchmarks" / "postgresql_server.py"
    specification = importlib.util.spec_from_file_location("postgresql_server", path)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module
