"""How a command ends: its status, its one line, its log, and what Ctrl-C does."""

import logging
import os
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from pathlib import Path

import pytest

from apportion.errors import InvalidInput
from apportion.studies.cli.interrupt import interruptible
from apportion.studies.cli.output import libraries_into
from apportion.studies.cli.session import Session, naming

STUDY = """
    import os, sys, time, types, warnings
    module = types.ModuleType("apportion.studies.study")
    class Study:
        @classmethod
        def submit(cls, spec, *, display, stop, **_):
            print("library on stdout"); os.write(2, b"library on stderr\\n")
            warnings.warn("library warns")
            display.line(f"threads {os.environ['OMP_NUM_THREADS']}")
            WORK
            return cls()
        def status(self): return {"state": "interrupted"}
    module.Study = Study
    sys.modules["apportion.studies.study"] = module
    from apportion.studies.cli import main
    main()
"""
WAIT = 'display.line("begun")\n            while not stop.is_set(): time.sleep(0.01)'


def submit(folder: Path, work: str, *words: str) -> subprocess.Popen[str]:
    (folder / "corpus").mkdir(exist_ok=True)
    (folder / "study.toml").write_text(
        '[study]\nname = "demo"\n[model]\nsource = "hf:o/m"\n[data]\nsource = "text:corpus"\n'
        "[limits]\nbits = 3.5\n[objective]\nthreads = 3\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(STUDY.replace("WORK", work)), "--home", "home"]
        + [*words, "submit", "study.toml"],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_libraries_talk_to_the_log(tmp_path: Path) -> None:
    process = submit(tmp_path, "pass")
    out, error = process.communicate(timeout=60)
    assert (out, error, process.returncode) == ("threads 3\n", "", 0)
    log = (tmp_path / "home/logs/demo.log").read_text()
    for words in ("library on stdout", "library on stderr", "library warns"):
        assert words in log


def test_unexpected_error_is_one_line_and_a_log(tmp_path: Path) -> None:
    process = submit(tmp_path, "1 / 0")
    _, error = process.communicate(timeout=60)
    assert process.returncode == 1
    assert error.startswith("apportion: ZeroDivisionError: division by zero (details in /")
    assert len(error.splitlines()) == 1
    assert "Traceback" in (tmp_path / "home/logs/demo.log").read_text()


def test_debug_shows_all(tmp_path: Path) -> None:
    process = submit(tmp_path, "1 / 0", "--debug")
    _, error = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "Traceback" in error and "library warns" in error


def test_ctrl_c_prints_the_resume_line(tmp_path: Path) -> None:
    process = submit(tmp_path, WAIT)
    assert process.stdout is not None
    while "begun" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (130, "")
    assert out.splitlines()[-1] == " to go on: apportion --home home resume demo"


def test_first_ctrl_c_sets_the_event_second_raises() -> None:
    said: list[str] = []
    with pytest.raises(KeyboardInterrupt), interruptible(said.append) as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.is_set()
        os.kill(os.getpid(), signal.SIGINT)
    assert len(said) == 1
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_waits_no_longer_than_its_grace() -> None:
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt), interruptible(lambda text: None, grace_s=0.1):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
    assert time.monotonic() - began < 2


def test_libraries_into_gives_everything_back(tmp_path: Path) -> None:
    before = sys.stdout, sys.stderr, logging.getLogger().handlers[:], warnings.showwarning
    with libraries_into(tmp_path / "log"):
        logging.getLogger("library").warning("said")
    assert (sys.stdout, sys.stderr, logging.getLogger().handlers, warnings.showwarning) == before
    assert "library: said" in (tmp_path / "log").read_text()


def test_unwritable_home_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "home").write_text("a file")
    process = submit(tmp_path, "pass")
    _, error = process.communicate(timeout=60)
    assert process.returncode == 2
    assert len(error.splitlines()) == 1 and "choose another folder with --home" in error


def test_naming_puts_the_file_before_places_only() -> None:
    with pytest.raises(InvalidInput) as refusal, naming(Path("study.toml")):
        raise InvalidInput("space[1].sites: no\nlimits cannot be met: no")
    assert str(refusal.value) == "study.toml: space[1].sites: no\nlimits cannot be met: no"


def test_session_sets_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    session = Session()
    session.home = type(session.home)(tmp_path)
    with session.working(2):
        assert os.environ["OMP_NUM_THREADS"] == "2"
