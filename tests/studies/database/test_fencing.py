"""A driver that is stopped beyond its lease and wakes after another took over writes nothing."""

import os
import signal
from collections.abc import Callable
from subprocess import Popen
from typing import Any

import pytest
from sqlalchemy import Connection

from apportion.errors import InvalidInput
from apportion.studies.database import Layout, Lease, LeaseLost, NewTrial, Store, tables

Start = Callable[..., "Popen[str]"]
Until = Callable[[Callable[[], object]], None]
WRITES = (
    "renew state stage answers proposals evaluation failure bill change uses forget release"
).split()
RELEASE = "release"  # of what is lost there is nothing to give back, so it is not refused

DRIVE = """
import sys
import numpy as np
from apportion.studies.database import Evaluation, Layout, LeaseLost, NewTrial, Store

KEY = "0123456789abcdef" * 2
store = Store.open(sys.argv[1])
lease = store.acquire(1, float(sys.argv[2]))
trial = NewTrial(configuration={"a": "dense"}, first_window=0, windows=1, part="search",
                 origin="x", costs={}, evaluation_key=KEY)
layout = Layout({"a": ["dense"]}, [])
done = Evaluation(np.ones(1), np.ones(1), None, 1.0)
lost = Evaluation(None, None, "a worker died", 1.0, "died")
writes = {
    "renew": lambda: store.renew(lease),
    "state": lambda: store.set_state(lease, "done", "export", "woken"),
    "stage": lambda: store.record_stage(lease, "search", 0, {"by": "woken"}, 1.0),
    "proposals": lambda: store.record_proposals(lease, 0, 0, layout, [trial], {"ilp": 1}),
    "answers": lambda: store.record_proposals(lease, 0, 0, layout, [], {"ilp": 1}),
    "evaluation": lambda: store.record_evaluation(lease, KEY, done),
    "failure": lambda: store.record_evaluation(lease, KEY, lost),
    "bill": lambda: store.record_bill(lease, {"done": (1, 1.0)}),
    "change": lambda: store.record_change(lease, 0, {"tokens": 1}),
    "uses": lambda: store.use_evaluations(lease, [KEY]),
    "forget": lambda: store.forget(lease),
    "release": lambda: store.release(lease),
}
print("leased", flush=True)
sys.stdin.readline()
for name in sys.argv[3:]:
    try:
        writes[name]()
        print(name, "written", flush=True)
    except LeaseLost:
        print(name, "lost", flush=True)
"""


def rows(store: Store) -> dict[str, Any]:
    def work(connection: Connection) -> dict[str, Any]:
        found = tables.metadata.sorted_tables
        return {table.name: connection.execute(table.select()).all() for table in found}

    return store.database.read(work)


def stopped_beyond_its_lease(start: Start, address: str) -> "Popen[str]":
    """A driver that took the lease of study 1 for half a second."""
    driver = start(DRIVE, address, 0.5, *WRITES)
    assert driver.stdout is not None and driver.stdout.readline() == "leased\n"
    driver.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, driver.pid, os.WSTOPPED | os.WNOWAIT)
    return driver


def woken(driver: "Popen[str]") -> dict[str, str]:
    """What its writes came to."""
    driver.send_signal(signal.SIGCONT)
    told, errors = driver.communicate("go\n")
    assert driver.returncode == 0, errors
    return dict(line.split() for line in told.splitlines())


def test_stalled_driver_writes_nothing(
    store: Store, address: str, start: Start, until: Until
) -> None:
    study = store.create_study("demo", {}, "hash")
    driver = stopped_beyond_its_lease(start, address)
    until(lambda: not store.studies()[0].is_owned)
    lease = store.acquire(study.id, 60)
    store.set_state(lease, "running", "search", "")
    before = rows(store)
    told = woken(driver)
    assert told == {name: "lost" for name in WRITES if name != RELEASE} | {RELEASE: "written"}
    assert rows(store) == before
    assert store.renew(lease) is None


def test_driver_that_is_taken_over_writes_nothing(store: Store, address: str, start: Start) -> None:
    study = store.create_study("demo", {}, "hash")
    driver = start(DRIVE, address, 1000, *WRITES)
    assert driver.stdout is not None and driver.stdout.readline() == "leased\n"
    with pytest.raises(InvalidInput, match="--take-over"):
        store.acquire(study.id, 60)
    lease = store.acquire(study.id, 60, take_over=True)
    before = rows(store)
    assert set(woken(driver).values()) == {"lost", "written"}
    assert rows(store) == before
    assert lease.epoch == 2


def test_stalled_driver_goes_on_where_nobody_took_over(
    store: Store, address: str, start: Start, until: Until
) -> None:
    store.create_study("demo", {}, "hash")
    driver = stopped_beyond_its_lease(start, address)
    until(lambda: not store.studies()[0].is_owned)
    told = woken(driver)
    assert told.pop("forget") == "written"  # it has trials: nothing to forget
    assert set(told.values()) == {"written"}
    assert store.studies()[0].message == "woken"
    assert store.trial_count(1) == 1


@pytest.mark.parametrize("taken_over", [True, False], ids=["taken over", "released"])
def test_lease_given_back_writes_nothing(
    store: Store,
    lease: Lease,
    layout: Layout,
    new_trial: Callable[[str], NewTrial],
    taken_over: bool,
) -> None:
    store.release(lease)
    if taken_over:
        store.acquire(lease.study_id, 60)
    before = rows(store)
    with pytest.raises(LeaseLost, match="no longer run by this process; nothing was written"):
        store.record_proposals(lease, 0, 0, layout, [new_trial("a")], {})
    assert rows(store) == before
