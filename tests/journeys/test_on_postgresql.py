"""The same study with its database on a PostgreSQL server: the same path, no password anywhere."""

import json
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.engine import make_url

Journey = Any
WAITS = "the study waits, results are kept"


def password_of(address: str) -> str:
    return str(make_url(address).password)


def in_files(folder: Path, word: str) -> list[Path]:
    """The files that hold a word."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return [path for path in files if word.encode() in path.read_bytes()]


def evaluated(server: Any, address: str) -> int:
    """Evaluations that are stored by now."""
    with suppress(subprocess.CalledProcessError):  # there is no table yet
        return int(server.sql("select count(*) from evaluations", make_url(address).database))
    return 0


def test_from_submit_to_export(
    journey: Journey, finished: Journey, postgresql_address: str, tmp_path: Path
) -> None:
    there, secret = ("--database", postgresql_address), password_of(postgresql_address)
    said = []
    for words in (
        ("submit", journey.study),
        ("status", "tiny", "--json"),
        ("list",),
        ("show", "tiny"),
        ("export", "tiny", "--to", tmp_path / "winner"),
        ("export", "tiny", "--optuna", f"sqlite:///{tmp_path / 'optuna.db'}"),
        ("db", "check"),
        ("db", "upgrade"),
        ("gc", "--dry-run"),
    ):
        ended = journey.piped(*there, *words)
        assert (ended.status, ended.error) == (0, ""), words
        said.append(ended.out)
    assert not (journey.home / "studies.db").exists()
    assert journey.path(address=postgresql_address) == finished.path()
    assert json.loads(said[1])["state"] == "finished"
    assert all(secret not in out for out in said)
    assert in_files(tmp_path, secret) == []
    assert journey.run("verify", tmp_path / "winner").status == 0
    ended = journey.piped(*there, "delete", "tiny", "--yes")
    assert (ended.status, secret in ended.out) == (0, False)
    assert journey.run(*there, "list", "--json").out == "[]\n"


def test_detached_shows_no_password(
    slow: Journey, finished: Journey, postgresql_address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = make_url(postgresql_address)
    secret = password_of(postgresql_address)
    hidden = url._replace(password=None).update_query_dict({"password": secret})
    address = hidden.render_as_string(hide_password=False)
    ended = slow.piped("--database", address, "submit", slow.study, "--detach")
    assert (ended.status, ended.error, secret in ended.out) == (0, "", False)
    (process,) = slow.processes()
    assert secret not in " ".join(process.cmdline())
    (slow.folder / "slow").touch()
    # as the next commands are told: the password is where libpq looks for it
    told = ("--database", url._replace(password=None).render_as_string())
    monkeypatch.setenv("PGPASSWORD", secret)
    stopped = slow.piped(*told, "stop", "tiny")
    assert (stopped.status, stopped.error) == (0, "")
    assert slow.nothing_left()
    (slow.folder / "slow").unlink()
    resumed = slow.piped(*told, "resume", "tiny")
    assert (resumed.status, resumed.error) == (0, "")
    assert slow.path(address=postgresql_address) == finished.path()
    assert in_files(slow.home, secret) == []


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("PASSWORD", "wrong", "authentication failed"),
        ("/test_", "/no_test_", "does not exist"),
        ("127.0.0.1:", "127.0.0.1:1", "check the address"),
    ],
)
def test_server_that_refuses_is_one_line(
    journey: Journey, postgresql_address: str, old: str, new: str, line: str
) -> None:
    secret = password_of(postgresql_address)
    address = postgresql_address.replace(secret if old == "PASSWORD" else old, new)
    ended = journey.piped("--database", address, "list")
    assert (ended.status, ended.out, ended.error.count("\n")) == (2, "", 1)
    assert line in ended.error and secret not in ended.error


def test_outage_costs_a_study_nothing_but_its_time(
    slow: Journey, finished: Journey, postgresql: Any, postgresql_address: str
) -> None:
    there = ("--database", postgresql_address)
    with slow.process(*there, "submit", slow.study) as process:
        slow.until(lambda: evaluated(postgresql, postgresql_address) > 5)
        (slow.folder / "slow").touch()
        postgresql.stop()
        try:
            said = [next(line for line in process.stdout if WAITS in line)]
            away = slow.piped(*there, "status", "tiny")
        finally:
            postgresql.start()
        (slow.folder / "slow").unlink()
        said += process.stdout.readlines()
        error = process.stderr.read()
        process.wait(60)
    assert (away.status, away.out, away.error.count("\n")) == (1, "", 1)
    assert "cannot be reached" in away.error and "is the server running?" in away.error
    assert (process.returncode, error) == (0, "")
    assert [WAITS in line for line in said].count(True) == 1
    assert not (slow.home / "spool" / "tiny").exists()
    assert slow.path(address=postgresql_address) == finished.path()
