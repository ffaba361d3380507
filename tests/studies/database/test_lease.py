"""One driver at a time owns a study, by the database's clock."""

import os
import time
from collections.abc import Callable
from dataclasses import replace
from subprocess import Popen

import pytest

from apportion.errors import InvalidInput
from apportion.studies.database import Lease, LeaseLost, Owner, Store

HOLD = """
import sys
from apportion.studies.database import Store
store = Store.open(sys.argv[1])
store.acquire(1, 1000)
print("held", flush=True)
sys.stdin.read()
"""


def test_lease_refused_while_another_stands(store: Store, lease: Lease) -> None:
    owner = rf'"demo" is being run by pid {os.getpid()} on \S+; .* resume demo --take-over$'
    with pytest.raises(InvalidInput, match=owner):
        store.acquire(lease.study_id, 60)
    assert store.studies()[0].is_owned


def test_lease_free_after_release(store: Store, lease: Lease) -> None:
    store.release(lease)
    assert not store.studies()[0].is_owned
    assert store.acquire(lease.study_id, 60).epoch == lease.epoch + 1


def test_lease_expires_unless_renewed(
    store: Store, lease: Lease, until: Callable[[Callable[[], object]], None]
) -> None:
    short = replace(lease, seconds=0.5)
    store.renew(short)
    with pytest.raises(InvalidInput):
        store.acquire(lease.study_id, 60)
    until(lambda: not store.studies()[0].is_owned)
    assert store.acquire(lease.study_id, 60).epoch == lease.epoch + 1


def test_lease_past_its_end_stands_until_another_is_given(store: Store, lease: Lease) -> None:
    store.renew(replace(lease, seconds=-1.0))
    assert not store.studies()[0].is_owned
    store.renew(lease)
    assert store.studies()[0].is_owned


def test_lease_taken_over(store: Store, lease: Lease) -> None:
    new = store.acquire(lease.study_id, 60, take_over=True)
    with pytest.raises(LeaseLost):
        store.renew(lease)
    store.renew(new)


def test_lease_ignores_this_machines_clock(
    store: Store, lease: Lease, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "time", lambda: 4e9)
    with pytest.raises(InvalidInput):
        store.acquire(lease.study_id, 60)


def test_clock_of_database_counts_seconds(store: Store) -> None:
    before = time.time()
    created_at = store.create_study("demo", {}, "hash").created_at
    assert before - 0.01 < created_at < time.time() + 0.01


def test_release_of_lost_lease_leaves_the_new_one(store: Store, lease: Lease) -> None:
    store.release(lease)
    new = store.acquire(lease.study_id, 60)
    store.release(lease)
    store.renew(new)
    assert store.studies()[0].is_owned


def test_lease_of_a_removed_study_is_none_of_its_successors(store: Store, lease: Lease) -> None:
    """SQLite gives its number to the next study, whose first lease has the same epoch."""
    assert store.forget(lease)
    successor = store.create_study("demo", {}, "hash")
    store.acquire(successor.id, 60)
    stale = replace(lease, study_id=successor.id)
    with pytest.raises(LeaseLost):
        store.set_state(stale, "failed", "search", "stale")
    store.release(stale)
    assert store.studies()[0].is_owned


def test_removed_study_not_leased(store: Store, lease: Lease) -> None:
    store.forget(lease)
    with pytest.raises(InvalidInput, match="not there any more"):
        store.acquire(lease.study_id, 60)


def test_driver_asked_to_stop(store: Store, lease: Lease) -> None:
    assert (store.stop_asked(lease.study_id), store.renew(lease)) == (None, None)
    for how in ("gently", "now"):
        store.ask_to_stop(lease.study_id, how)
        assert (store.stop_asked(lease.study_id), store.renew(lease)) == (how, how)
    store.release(lease)
    store.acquire(lease.study_id, 60)
    assert store.stop_asked(lease.study_id) is None


def test_lease_of_killed_process_taken_over(
    store: Store, address: str, start: Callable[..., "Popen[str]"]
) -> None:
    study = store.create_study("demo", {}, "hash")
    driver = start(HOLD, address)
    assert driver.stdout is not None and driver.stdout.readline() == "held\n"
    with pytest.raises(InvalidInput, match=f"pid {driver.pid} on "):
        store.acquire(study.id, 60)
    driver.kill()
    os.waitid(os.P_PID, driver.pid, os.WEXITED | os.WNOWAIT)  # dead, its number still taken
    assert store.acquire(study.id, 60).epoch == 2


def test_owner_dead_when_number_is_reused() -> None:
    owner = Owner.this_process()
    assert not owner.is_dead()
    assert replace(owner, started=owner.started - 100).is_dead()


def test_owner_dead_when_process_is_gone(start: Callable[..., "Popen[str]"]) -> None:
    process = start("")
    process.communicate()
    assert replace(Owner.this_process(), pid=process.pid).is_dead()


def test_owner_of_another_host_never_said_dead() -> None:
    assert not Owner("elsewhere", 2**22 - 1, 0.0).is_dead()
