"""A server that is in the way, away for a while, or not to be reached at all."""

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest
from sqlalchemy import Connection, make_url, text
from sqlalchemy.exc import OperationalError

from apportion.errors import ApportionError, InvalidInput
from apportion.studies.database import DatabaseAway, Evaluation, Lease, Store
from apportion.studies.database import postgresql as module

pytestmark = pytest.mark.parametrize("address", ["postgresql"], indirect=True)

WRITE = text("UPDATE studies SET message = message || :told WHERE id = :id")
FAILED = 'connection failed: connection to server at "127.0.0.1", port 5432 failed: '


@pytest.fixture
def stopped(postgresql: Any) -> Iterator[Callable[[], None]]:
    """stopped(): stop the server; it runs again afterwards in any case."""
    yield postgresql.stop
    if "no server" in _status(postgresql):
        postgresql.start()


def _status(server: Any) -> str:
    try:
        return str(server.sql("SELECT 1"))
    except subprocess.CalledProcessError:
        return "no server"


def test_deadlock_is_tried_again(store: Store) -> None:
    ids = [store.create_study(name, {}, "hash").id for name in "ab"]
    both_hold_one, attempts = threading.Barrier(2), []

    def write(order: list[int], told: str) -> None:
        def work(connection: Connection) -> None:
            attempts.append(told)
            connection.execute(WRITE, {"told": told, "id": order[0]})
            if attempts.count(told) == 1:
                both_hold_one.wait(30)
            connection.execute(WRITE, {"told": told, "id": order[1]})

        store.database.write(work)

    threads = [
        threading.Thread(target=write, args=(ids, "x")),
        threading.Thread(target=write, args=(ids[::-1], "y")),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [sorted(study.message) for study in store.studies()] == [["x", "y"]] * 2
    assert len(attempts) == 3


def test_failed_serialization_is_tried_again(store: Store, lease: Lease) -> None:
    attempts = []

    def work(connection: Connection) -> None:
        attempts.append(1)
        connection.execute(WRITE, {"told": "x", "id": lease.study_id})
        if len(attempts) < 3:
            fail = "DO $$ BEGIN RAISE EXCEPTION 'conflict' USING ERRCODE = '40001'; END $$"
            connection.execute(text(fail))

    store.database.write(work)
    assert (len(attempts), store.studies()[0].message) == (3, "x")


def test_server_away_while_a_write_waits(
    store: Store, lease: Lease, postgresql: Any, stopped: Callable[[], None]
) -> None:
    is_away = threading.Event()

    def goes_on(error: ApportionError, seconds: float) -> bool:
        is_away.set()
        return seconds < 60

    store.database.goes_on = goes_on
    stopped()
    write = threading.Thread(target=store.set_state, args=(lease, "running", "search", "back"))
    write.start()
    assert is_away.wait(30)
    assert write.is_alive()
    postgresql.start()
    write.join(60)
    assert store.studies()[0].message == "back"


def test_server_started_again_in_mid_transaction(
    store: Store, lease: Lease, postgresql: Any, stopped: Callable[[], None]
) -> None:
    attempts = []

    def work(connection: Connection) -> None:
        attempts.append(1)
        connection.execute(WRITE, {"told": "x", "id": lease.study_id})
        if len(attempts) == 1:
            stopped()
            postgresql.start()
        connection.execute(WRITE, {"told": "y", "id": lease.study_id})

    store.database.write(work)
    assert (len(attempts), store.studies()[0].message) == (2, "xy")


def test_server_started_again_between_two_writes(
    store: Store,
    lease: Lease,
    postgresql: Any,
    stopped: Callable[[], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    stopped()
    postgresql.start()
    store.set_state(lease, "running", "search", "")
    assert store.studies()[0].state == "running"
    assert caplog.records == []


def test_giving_up_names_the_address_without_its_password(
    store: Store, lease: Lease, address: str, stopped: Callable[[], None]
) -> None:
    asked = []
    store.database.goes_on = lambda error, seconds: bool(asked.append((error, seconds)))
    stopped()
    with pytest.raises(DatabaseAway) as error:
        store.set_state(lease, "running", "search", "")
    assert_one_line(error, address)
    assert "cannot be reached" in str(error.value)
    assert asked == [(error.value, 0.0)]


def test_an_evaluation_may_wait_longer_than_all_else(
    store: Store, lease: Lease, key: Callable[[str], str], stopped: Callable[[], None]
) -> None:
    answers = iter([True, True, False])
    result = Evaluation(None, None, "ValueError: no", 0.5, "raised")
    store.database.goes_on = lambda error, seconds: False
    stopped()
    with pytest.raises(DatabaseAway):
        store.record_evaluation(lease, key("a"), result, lambda error, seconds: next(answers))
    assert list(answers) == []


def test_stopped_driver_does_not_keep_a_study_for_ever(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = module.SETTINGS | {"idle_in_transaction_session_timeout": "300ms"}
    monkeypatch.setattr(module, "SETTINGS", short)
    store = Store.open(address)
    lease = store.acquire(store.create_study("demo", {}, "hash").id, 60)
    attempts = []

    def work(connection: Connection) -> None:
        attempts.append(1)
        connection.execute(WRITE, {"told": "x", "id": lease.study_id})
        if len(attempts) == 1:
            store.set_state(lease, "running", "", "y")  # waits for this transaction's row
        connection.execute(WRITE, {"told": "z", "id": lease.study_id})

    store.database.write(work)
    assert (len(attempts), store.studies()[0].message) == (2, "yxz")
    store.close()


def test_migration_may_take_its_time(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SETTINGS", module.SETTINGS | {"statement_timeout": "300ms"})
    store = Store.open(address)
    slow = text("SELECT pg_sleep(0.5)")
    with pytest.raises(ApportionError, match="timeout"):
        store.database.write(lambda connection: connection.execute(slow))

    def work(connection: Connection) -> None:
        store.database.server.lock_for_migration(connection)
        connection.execute(slow)

    store.database.write(work)
    store.close()


def test_reading_cannot_write(store: Store) -> None:
    with pytest.raises(InvalidInput, match="may not be written"):
        store.database.read(lambda c: c.execute(text("DELETE FROM studies")))


def wrong(address: str, **parts: Any) -> str:
    return make_url(address).set(**parts).render_as_string(hide_password=False)


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"password": "secret"}, "password authentication failed"),
        ({"database": "nowhere"}, '"nowhere" does not exist'),
        ({"host": "nowhere.invalid"}, "nowhere.invalid"),
        ({"port": 99_999}, "99999"),
        ({"query": {"sslmode": "require"}}, "SSL"),
    ],
    ids=["password", "database", "host", "port", "ssl"],
)
def test_wrong_address_is_told_at_once(address: str, parts: dict[str, Any], said: str) -> None:
    began = time.monotonic()
    with pytest.raises(ApportionError, match=said) as error:
        Store.open(wrong(address, **parts))
    assert_one_line(error, wrong(address, **parts))
    if "Temporary failure" not in str(error.value):  # nobody here who knows names
        assert time.monotonic() - began < 5
        assert isinstance(error.value, InvalidInput)


def test_password_after_the_question_mark_not_shown(address: str) -> None:
    url = make_url(address).set(password=None).update_query_dict({"password": "secret"})
    with pytest.raises(InvalidInput) as error:
        Store.open(url.render_as_string())
    assert "secret" not in str(error.value)


def test_nobody_answers(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("apportion.studies.database.engine.PATIENCE_SECONDS", 0.2)
    with pytest.raises(DatabaseAway, match="Connection refused.*is the server running") as error:
        Store.open(wrong(address, port=1))
    assert_one_line(error, wrong(address, port=1))


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        (FAILED + "FATAL:  the database system is starting up", "away"),
        (FAILED + "FATAL:  the database system is shutting down", "away"),
        (FAILED + "FATAL:  sorry, too many clients already", "away"),
        (FAILED + "Connection refused\n\tIs the server running on that host?", "away"),
        ("failed to resolve host 'h': [Errno -3] Temporary failure in name resolution", "away"),
        ("server closed the connection unexpectedly", "away"),
        (FAILED + 'FATAL:  no pg_hba.conf entry for host "10.0.0.1"', "final"),
        (
            "Multiple connection attempts failed. All failures were:\n"
            f"- host: 'h', hostaddr: '::1': {FAILED}Connection refused\n"
            f"- host: 'h', hostaddr: '127.0.0.1': {FAILED}FATAL:  password authentication failed",
            "final",
        ),
    ],
)
def test_which_failed_connections_are_worth_waiting_for(store: Store, said: str, kind: str) -> None:
    error = OperationalError("SELECT 1", {}, psycopg.OperationalError(said))
    trouble = store.database.server.trouble(error)
    assert trouble.kind == kind
    assert "\n" not in str(trouble.error) and "failures were" not in str(trouble.error)
    assert ("password authentication" in said) == ("password authentication" in str(trouble.error))


def test_driver_not_installed(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(InvalidInput, match=r"pip install 'apportion\[postgres\]'$") as error:
        Store.open(address)
    assert_one_line(error, address)


def assert_one_line(error: pytest.ExceptionInfo[ApportionError], address: str) -> None:
    url = make_url(address)
    assert str(error.value).startswith(f"{url.render_as_string()}: ")
    assert url.password is not None and url.password not in str(error.value)
    assert "\n" not in str(error.value)
