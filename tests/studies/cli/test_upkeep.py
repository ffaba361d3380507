"""delete, gc and db as they are typed, in processes of their own."""

import json
import os
import pty
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import alembic.command
import pytest
import torch
from alembic.config import Config
from sqlalchemy import create_engine

from apportion.kernels.formats import Format, LayerShape, StoredWeight
from apportion.spaces.bank import Bank
from apportion.spaces.stored import StoredSite
from apportion.studies.database import Store, schema
from apportion.studies.home import Home
from apportion.studies.specification import StudySpec

ENTRY = "ab" + "0" * 30
LINE = [sys.executable, "-m", "apportion", "--home"]


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home").create()


@pytest.fixture
def store(home: Home) -> Iterator[Store]:
    """Of a study "demo" that nobody runs and whose bank entry is there."""
    store = Store.open(home.database)
    lease = store.acquire(create(store, "demo"), 60)
    index = {"site": {"w4g64": ENTRY}}
    store.record_stage(lease, "compress", 0, {"index": index, "entries": 1}, 1.0)
    store.release(lease)
    weight = StoredWeight(Format(dtype="float32"), LayerShape(4, 4), {"weight": torch.ones(4, 4)})
    Bank(home.bank).put(ENTRY, StoredSite((weight,)))
    yield store
    store.close()


def create(store: Store, name: str) -> int:
    spec = StudySpec(
        study={"name": name},
        model={"source": "hf:o/m"},
        data={"source": "text:/corpus", "context": 8},
        limits={"bits": 3.5},
    )
    return store.create_study(name, spec.to_json(), spec.spec_hash).id


def run(home: Home, *words: str) -> subprocess.CompletedProcess[str]:
    line = [*LINE, str(home.path), *words]
    return subprocess.run(
        line, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60
    )


def on_terminal(home: Home, answer: bytes, *words: str) -> tuple[int, str]:
    """A command that can ask; what it says on the terminal."""
    ours, theirs = pty.openpty()
    line = [*LINE, str(home.path), *words]
    process = subprocess.Popen(line, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    os.write(ours, answer)
    said = b""
    try:
        while part := os.read(ours, 4096):
            said += part
    except OSError:
        pass  # how a terminal says that nobody is left at its other end
    os.close(ours)
    return process.wait(60), said.decode()


def names(store: Store) -> list[str]:
    return [study.name for study in store.studies()]


def test_delete_asks_on_a_terminal(home: Home, store: Store) -> None:
    status, said = on_terminal(home, b"n\n", "delete", "demo")
    assert status == 0 and "delete study demo? [y/N]" in said and "nothing was deleted" in said
    assert "would be removed with study demo" in said
    assert names(store) == ["demo"]
    status, said = on_terminal(home, b"y\n", "delete", "demo")
    assert status == 0 and "deleted study demo" in said
    assert names(store) == []


def test_ctrl_c_at_the_question_deletes_nothing(home: Home, store: Store) -> None:
    status, said = on_terminal(home, b"\x04", "delete", "demo")
    assert (status, "Traceback" in said, names(store)) == (130, False, ["demo"])


def test_delete_without_anybody_to_ask_wants_yes(home: Home, store: Store) -> None:
    done = run(home, "delete", "demo")
    assert (done.returncode, done.stdout, names(store)) == (2, "", ["demo"])
    assert done.stderr.endswith("--yes\n") and done.stderr.count("\n") == 1
    done = run(home, "delete", "demo", "--yes")
    assert (done.returncode, done.stderr, names(store)) == (0, "", [])
    assert "deleted study demo: " in done.stdout and "freed" in done.stdout


def test_delete_as_json(home: Home, store: Store) -> None:
    size = next(home.bank.rglob("*.safetensors")).stat().st_size
    removal = json.loads(run(home, "delete", "demo", "--yes", "--json").stdout)
    assert (removal["study"], removal["removed"]["bank"]) == ("demo", {"count": 1, "bytes": size})


def test_running_study_is_not_deleted(home: Home, store: Store) -> None:
    store.acquire(create(store, "busy"), 60)
    done = run(home, "delete", "busy", "--yes")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert f"being run by pid {os.getpid()}" in done.stderr
    assert done.stderr.endswith(f"stop it first: apportion --home {home.path} stop busy\n")


@pytest.mark.parametrize("words", [["delete", "dmo", "--yes"], ["status", "dmo", "--follow"]])
def test_unknown_study_is_said_as_elsewhere(home: Home, store: Store, words: list[str]) -> None:
    done = run(home, *words)
    assert done.returncode == 2
    assert done.stderr == f'no study "dmo" in {home.path}; studies there: demo\n'


@pytest.mark.parametrize("words", [["gc"], ["bank", "gc"], ["db", "check"], ["db", "upgrade"]])
def test_no_home_is_made_to_be_looked_after(tmp_path: Path, words: list[str]) -> None:
    none = Home(tmp_path / "none")
    done = run(none, *words)
    assert (done.returncode, done.stderr) == (2, f"no studies in {none.path}\n")
    assert not none.path.exists()


def test_gc_says_what_goes_and_what_went(home: Home, store: Store) -> None:
    (home.cache / "calibration-x.safetensors").write_bytes(bytes(2_000_000))
    dry = run(home, "gc", "--dry-run")
    assert "cache  1      2 MB" in dry.stdout and "2 MB would be removed" in dry.stdout
    assert any(home.cache.iterdir())
    assert " 2 MB freed\n" in run(home, "gc").stdout
    assert not any(home.cache.iterdir())
    assert run(home, "gc").stdout == " there is nothing to remove\n"
    record = json.loads(run(home, "gc", "--json").stdout)
    assert (record["study"], record["removed"], record["left"]) == (None, {}, [])


def test_gc_imports_nothing_heavy(home: Home, store: Store) -> None:
    code = (
        "from apportion.studies.cli.app import run; from apportion.studies.cli.session import *;"
        f"import sys; run(['--home', {str(home.path)!r}, 'gc'], Session());"
        "print([m for m in ('torch', 'ray', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_check_says_that_all_is_whole(home: Home, store: Store) -> None:
    done = run(home, "db", "check")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == " 1 study, 0 trials, 0 evaluations, 1 bank entries: all whole\n"
    assert json.loads(run(home, "db", "check", "--json").stdout) == {
        "studies": 1,
        "trials": 0,
        "evaluations": 0,
        "entries": 1,
        "problems": [],
    }


def remove(file: Path) -> None:
    file.unlink()


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("damage", "line"),
    [(remove, "study demo: 1 of 1 bank entries are not in"), (cut, "cannot be read")],
)
def test_check_finds_entries_that_are_not_whole(
    home: Home, store: Store, damage: Callable[[Path], None], line: str
) -> None:
    damage(next(home.bank.rglob("*.safetensors")))
    done = run(home, "db", "check")
    assert (done.returncode, done.stdout.count("\n"), done.stderr) == (1, 1, "")
    assert line in done.stdout
    record = run(home, "db", "check", "--json")
    assert record.returncode == 1 and len(json.loads(record.stdout)["problems"]) == 1


def test_check_finds_rows_that_cannot_be_read(home: Home, store: Store) -> None:
    with sqlite3.connect(home.path / "studies.db") as connection:
        connection.execute("UPDATE stage_outputs SET output = '{'")
    done = run(home, "db", "check")
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout.startswith(" stage_outputs (study demo, stage compress, round 0): cannot")


def test_upgrade_of_what_is_up_to_date(home: Home, store: Store) -> None:
    done = run(home, "db", "upgrade")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"{home.path}/studies.db is up to date (revision " in done.stdout


def test_upgrade_says_what_it_did(home: Home) -> None:
    path = home.path / "studies.db"
    engine = create_engine(f"sqlite:///{path}")
    with engine.begin() as connection:
        attributes = {"connection": connection, "version_table": schema.VERSION_TABLE}
        config = Config(attributes=attributes)
        config.set_main_option("script_location", "apportion.studies.database:migrations")
        alembic.command.upgrade(config, "0001")
    engine.dispose()
    before = run(home, "list")
    assert before.returncode == 2 and "apportion db upgrade" in before.stderr
    done = run(home, "db", "upgrade")
    assert (done.returncode, done.stderr) == (0, "")
    changed, backup = done.stdout.splitlines()
    assert changed == f" {path}: revision 0001 -> {schema.REVISIONS[-1]}"
    assert Path(backup.removeprefix(" backup ")).is_file()
    assert run(home, "list").returncode == 0


def test_reader_that_leaves_is_no_error(home: Home, store: Store) -> None:
    line = " ".join([*LINE, str(home.path), "delete demo --yes | true; exit ${PIPESTATUS[0]}"])
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
    assert (done.returncode in (0, 141), done.stderr, names(store)) == (True, "", [])
