"""A study that takes a second, in a folder of its own, and the command line to run it with."""

import io
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from apportion.errors import ApportionError
from apportion.studies.cli.app import run
from apportion.studies.cli.failures import fail
from apportion.studies.cli.session import Session
from apportion.studies.database.store import Store

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    status: int
    out: str
    error: str


@dataclass(frozen=True)
class Journey:
    """A folder with a study, and a home."""

    folder: Path
    home: Path

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

    def command(self, *words: object) -> list[str]:
        """The same as a process."""
        line = [sys.executable, "-m", "apportion", "--home", self.home, *words]
        return [str(word) for word in line]

    def listed(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = json.loads(self.run("list", "--json").out)
        return rows

    def path(self) -> dict[str, Any]:
        """The ordered trials with their losses, and the report."""
        store = Store.open(self.home / "studies.db")
        try:
            (study,) = store.studies()
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
def finished(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Journey:
    """The study, undisturbed. Read it only."""
    folder = tmp_path_factory.mktemp("finished")
    shutil.copytree(files, folder / "study")
    journey = Journey(folder / "study", folder / "home")
    ended = journey.submit()
    assert (ended.status, ended.error) == (0, "")
    return journey
