"""A study that takes a second, in a folder of its own, and the command line to run it with."""

import io
import json
import os
import pty
import re
import runpy
import select
import shutil
import signal
import sqlite3
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from apportion.errors import ApportionError
from apportion.studies.cli.app import run
from apportion.studies.cli.failures import fail
from apportion.studies.cli.session import Session
from apportion.studies.database.store import Store

ROOT = Path(__file__).parents[2]
LONGEST_S = 120.0
COLUMNS = 80
OWN_STUDY = """
[study]
name = "tiny"
[model]
source = "python:model.py:build"
[data]
source = "python:model.py:load"
[[space]]
sites = "{sites}"
options = {options}
[devices.here]
kind = "recorded"
file = "timings.json"
request = [{{ phase = "forward", batch = 1 }}]
[limits]
weight_bytes = "{limit}"
[search]
windows = 8
tokens = 100
"""
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    status: int
    out: str
    error: str


def until(condition: Callable[[], Any]) -> Any:
    """Wait until something holds."""
    deadline = time.monotonic() + LONGEST_S
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.02)
    raise AssertionError("waited in vain")


class Terminal:
    """A command that a user types at a terminal, which can be hung up."""

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        self._ours, theirs = pty.openpty()
        termios.tcsetwinsize(theirs, (24, COLUMNS))
        self.process = subprocess.Popen(
            ["setsid", "--ctty", *command],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=environment | {"TERM": "xterm"},
        )
        os.close(theirs)
        self._said = b""

    @property
    def said(self) -> str:
        """All until now, without what moves the cursor and colors."""
        return ESCAPES.sub("", self._said.decode(errors="replace"))

    def type(self, keys: str) -> None:
        os.write(self._ours, keys.encode())

    def wait_for(self, words: str) -> None:
        """Read until it has said so."""
        while words not in self.said:
            assert self._read(), self.said

    def end(self) -> tuple[int, str]:
        """Read to the end: exit status and what was said."""
        while self._read():
            pass
        return self.process.wait(LONGEST_S), self.said

    def hang_up(self) -> None:
        """The window is closed, the line is lost."""
        if self._ours >= 0:
            os.close(self._ours)
            self._ours = -1

    def _read(self) -> bool:
        assert select.select([self._ours], [], [], LONGEST_S)[0], "waited in vain"
        with suppress(OSError):  # how a terminal says that nobody is left at its other end
            part = os.read(self._ours, 4096)
            self._said += part
            return bool(part)
        return False


@dataclass(frozen=True)
class Journey:
    """A folder with a study, and a home."""

    folder: Path
    home: Path
    until = staticmethod(until)

    @property
    def study(self) -> Path:
        return self.folder / "study.toml"

    def edit(self, file: str, old: str, new: str) -> None:
        """Replace what a file says once."""
        text = (self.folder / file).read_text()
        assert text.count(old) == 1
        (self.folder / file).write_text(text.replace(old, new))

    def run(self, *words: object) -> Ended:
        """A command line, in this process; an unexpected error ends it as it would end ours."""
        out, error = io.StringIO(), io.StringIO()
        session = Session()
        with redirect_stdout(out), redirect_stderr(error):
            try:
                status = run(["--home", str(self.home), *map(str, words)], session)
            except (ApportionError, ArithmeticError, LookupError, OSError, RuntimeError) as raised:
                status = fail(session, raised)
            except (AttributeError, TypeError, ValueError) as raised:
                status = fail(session, raised)
        return Ended(status, out.getvalue(), error.getvalue())

    def submit(self) -> Ended:
        return self.run("submit", self.study)

    @property
    def environment(self) -> dict[str, str]:
        """Of processes, which are known by it."""
        return os.environ | {"APPORTION_HOME": str(self.home)}

    @contextmanager
    def process(self, *words: object, before: tuple[str, ...] = ()) -> Iterator[Any]:
        """A command into pipes, in a process group of its own, which is ended with it.

        Args:
            before: words in front of the command, as `nohup`.
        """
        process = subprocess.Popen(
            [*before, sys.executable, "-m", "apportion", *map(str, words)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=self.environment,
            start_new_session=True,
        )
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()

    def piped(self, *words: object, before: tuple[str, ...] = ()) -> Ended:
        """A command into pipes, from its beginning to its end."""
        with self.process(*words, before=before) as process:
            out, error = process.communicate(timeout=LONGEST_S)
        return Ended(process.returncode, out, error)

    @contextmanager
    def terminal(self, *words: object, before: tuple[str, ...] = ()) -> Iterator[Terminal]:
        """A command on a terminal."""
        command = [*before, sys.executable, "-m", "apportion", *map(str, words)]
        terminal = Terminal(command, self.environment)
        try:
            yield terminal
        finally:
            terminal.hang_up()
            terminal.process.kill()
            terminal.process.wait()

    def processes(self) -> list[psutil.Process]:
        """Those that name the study's home, or descend from one that did."""
        mark = str(self.home)
        return [p for p in psutil.process_iter() if _home_of(p) == mark]

    def nothing_left(self) -> bool:
        """Whether all processes have come to their end."""
        return until(lambda: not self.processes()) is True

    def evaluated(self) -> int:
        """Evaluations that are stored."""
        file = self.home / "studies.db"
        if not file.is_file():
            return 0
        with closing(sqlite3.connect(file)) as connection, suppress(sqlite3.OperationalError):
            return int(connection.execute("select count(*) from evaluations").fetchone()[0])
        return 0

    def slowed(self, seconds: float) -> None:
        """From when the file `slow` is there, each forward pass takes so much longer."""
        old = "    def forward(self, x: Tensor) -> Tensor:\n        for block"
        head = old.rpartition("        for")[0]
        slow = "Path(__file__).with_name('slow').exists()"
        new = f"{head}        time.sleep({seconds} if {slow} else 0)\n        for block"
        self.edit("model.py", old, new)
        imports = "import time\nfrom pathlib import Path\n\nimport torch\n"
        self.edit("model.py", "import torch\n", imports)

    def command(self, *words: object) -> list[str]:
        """The same as a process."""
        line = [sys.executable, "-m", "apportion", "--home", self.home, *words]
        return [str(word) for word in line]

    def listed(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = json.loads(self.run("list", "--json").out)
        return rows

    def status(self, name: str = "tiny") -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.run("status", name, "--json").out)
        return found

    def path(self, name: str = "tiny", address: str | None = None) -> dict[str, Any]:
        """The ordered trials with their losses, and the report."""
        store = Store.open(address or self.home / "studies.db")
        try:
            (study,) = (study for study in store.studies() if study.name == name)
            trials = store.trials(study.id)
            done = store.evaluations([t.evaluation_key for t in trials], study.id)
            report = store.stage_output(study.id, "report")
        finally:
            store.close()
        losses = [done[trial.evaluation_key].losses for trial in trials]
        rows = [
            (t.number, t.configuration, t.first_window, t.windows, t.origin, list(found))
            for t, found in zip(trials, losses, strict=True)
            if found is not None
        ]
        return {"trials": rows, "report": report}


def _home_of(process: psutil.Process) -> str | None:
    try:
        return process.environ().get("APPORTION_HOME")
    except (psutil.NoSuchProcess, psutil.AccessDenied, OSError):
        return None


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The study's files, with timings taken once."""
    folder = tmp_path_factory.mktemp("tiny")
    script = ROOT / "benchmarks" / "tiny_study.py"
    subprocess.run([sys.executable, str(script), str(folder)], check=True)
    return folder


@pytest.fixture
def journey(files: Path, tmp_path: Path) -> Journey:
    shutil.copytree(files, tmp_path / "study")
    return Journey(tmp_path / "study", tmp_path / "home")


@pytest.fixture(scope="session")
def journey_in() -> Callable[[Path], Journey]:
    """A journey in another folder, whose study is in `study`."""
    return lambda folder: Journey(folder / "study", folder / "home")


@pytest.fixture
def own_model(tmp_path: Path) -> Callable[[str, str, list[str], str], Journey]:
    """A study of a model's code, of the options of its sites and a limit on bytes, timed here."""

    def build(code: str, sites: str, options: list[str], limit: str) -> Journey:
        journey = Journey(tmp_path / "study", tmp_path / "home")
        journey.folder.mkdir()
        (journey.folder / "model.py").write_text(code.lstrip())
        text = OWN_STUDY.format(sites=sites, options=json.dumps(options), limit=limit)
        journey.study.write_text(text.lstrip())
        script = runpy.run_path(str(ROOT / "benchmarks" / "tiny_study.py"))
        script["record"](journey.study, journey.folder / "timings.json")
        return journey

    return build


@pytest.fixture(scope="session")
def finished(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Journey:
    """The study, undisturbed. Read it only."""
    folder = tmp_path_factory.mktemp("finished")
    shutil.copytree(files, folder / "study")
    journey = Journey(folder / "study", folder / "home")
    ended = journey.submit()
    assert (ended.status, ended.error) == (0, "")
    return journey


@pytest.fixture
def slow(journey: Journey) -> Iterator[Journey]:
    """A study that a test can make slow; what it started is ended."""
    journey.slowed(0.5)
    yield journey
    for process in journey.processes():
        process.kill()
    assert journey.nothing_left()
