"""The bill adds up."""

from apportion.workers.bill import Bill


def test_seconds_add_up_by_outcome() -> None:
    bill = Bill()
    bill.add("done", 2.0)
    bill.add("done", 3.0)
    bill.add("timeout", 5.0)
    assert bill.entries()["done"] == (2, 5.0)
    assert bill.entries()["memory"] == (0, 0.0)
    assert bill.busy_seconds == 10.0


def test_failures_are_no_waste_and_only_lost_workers_are_recoveries() -> None:
    bill = Bill()
    for seconds, outcome in enumerate(("done", "failed", "timeout", "memory", "died", "cancelled")):
        bill.add(outcome, 10.0**seconds)  # type: ignore[arg-type]
    assert bill.recoveries == 3
    assert bill.wasted_seconds == 111_100.0
