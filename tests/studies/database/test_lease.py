"""One driver at a time owns a study."""

import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from subprocess import Popen

import pytest

from apportion.errors import InvalidInput
from apportion.studies.database import Lease, LeaseLost, NewTrial, Owner, Store

HOLD = """
import sys
from apportion.studies.database import Store
store = Store.open(sys.argv[1])
store.acquire(1, 1000)
print("held", flush=True)
sys.stdin.read()
"""


def test_lease_refused_while_another_stands(store: Store, lease: Lease) -> None:
    with pytest.raises(InvalidInput, match=rf'"demo" is being run by pid {os.getpid()} on \S+$'):
        store.acquire(lease.study_id, 60)
    assert store.studies()[0].is_owned


def test_lease_free_after_release(store: Store, lease: Lease) -> None:
    store.release(lease)
    assert not store.studies()[0].is_owned
    assert store.acquire(lease.study_id, 60).epoch == lease.epoch + 1


def test_lease_expires_unless_renewed(store: Store, lease: Lease) -> None:
    store.renew(replace(lease, seconds=0.5))
    with pytest.raises(InvalidInput):
        store.acquire(lease.study_id, 60)
    time.sleep(0.55)
    assert store.acquire(lease.study_id, 60).epoch == lease.epoch + 1


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


WRITES: dict[str, Callable[[Store, Lease, NewTrial], object]] = {
    "renew": lambda store, lease, trial: store.renew(lease),
    "state": lambda store, lease, trial: store.set_state(lease, "done", "export", ""),
    "stage": lambda store, lease, trial: store.record_stage(lease, "search", 0, {}, 1.0),
    "proposals": lambda store, lease, trial: store.record_proposals(lease, 0, [trial], {}),
}


@pytest.mark.parametrize("taken_over", [True, False], ids=["taken over", "released"])
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_lost_lease_writes_nothing(
    store: Store,
    lease: Lease,
    write: Callable[[Store, Lease, NewTrial], object],
    new_trial: Callable[[str], NewTrial],
    taken_over: bool,
) -> None:
    store.release(lease)
    if taken_over:
        store.acquire(lease.study_id, 60)
    with pytest.raises(LeaseLost):
        write(store, lease, new_trial("key"))
    assert store.studies()[0].state == "stopped"
    assert store.stage_output(lease.study_id, "search") is None
    assert store.trials(lease.study_id) == []
    assert store.studies()[0].is_owned == taken_over


def test_release_of_lost_lease_leaves_the_new_one(store: Store, lease: Lease) -> None:
    store.release(lease)
    new = store.acquire(lease.study_id, 60)
    store.release(lease)
    store.renew(new)


def test_lease_of_killed_process_taken_over(
    store: Store, path: Path, start: Callable[..., "Popen[str]"]
) -> None:
    study = store.create_study("demo", {}, "hash")
    driver = start(HOLD, path)
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
