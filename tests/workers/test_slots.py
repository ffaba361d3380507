"""What becomes of work whose worker is lost, with workers that are lost as the test says."""

import threading
import time
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from apportion.errors import ApportionError
from apportion.workers.bill import Bill, Loss
from apportion.workers.evaluator import Evaluate, Evaluation
from apportion.workers.slots import Lost, Slots

WORK = Evaluate({}, "search", 0, 8)
DONE = Evaluation(np.ones(8), np.ones(8), None, 0.0)
Lose = Callable[[], Lost | None]


def lost(outcome: Loss = "died", reason: str = "its worker died of it", **options: bool) -> Lost:
    return Lost(outcome, reason, lambda: None, **options)  # type: ignore[arg-type]


class Losing:
    """A worker that loses its work as long as there are losses, which all places share."""

    def __init__(self, losses: list[Lost]) -> None:
        self.losses = losses
        self.calls = 0

    def __call__(self, work: Sequence[Evaluate]) -> list[Evaluation]:
        self.calls += 1
        if self.losses:
            raise self.losses.pop(0)
        return [DONE for _ in work]


def test_lost_work_is_done_once_more_in_another_place() -> None:
    losses = [lost()]
    places, bill = [Losing(losses) for _ in range(3)], Bill()
    assert Slots(places, bill).submit(WORK).result(10) is DONE
    assert sorted(place.calls for place in places) == [0, 1, 1]
    assert bill.entries()["died"][0] == bill.entries()["done"][0] == bill.recoveries == 1


def test_only_place_gets_its_work_back() -> None:
    place = Losing([lost()])
    assert Slots([place], Bill()).submit(WORK).result(10) is DONE
    assert place.calls == 2


def test_work_that_is_lost_twice_is_a_failure_and_the_next_is_not() -> None:
    place = Losing([lost("timeout", "took longer than 5 s") for _ in range(2)])
    slots = Slots([place], Bill())
    result = slots.submit(WORK).result(10)
    assert (result.failure, result.error_class) == ("took longer than 5 s twice", "timeout")
    assert result.losses is None
    assert slots.submit(WORK).result(10) is DONE


def test_failure_tells_of_both_losses_where_they_differ() -> None:
    place = Losing([lost("timeout", "took longer than 5 s"), lost()])
    result = Slots([place], Bill()).submit(WORK).result(10)
    assert result.failure == "took longer than 5 s, then its worker died of it"
    assert result.error_class == "died"


def test_losses_are_counted_for_each_work_alone() -> None:
    losses: list[Lost] = []
    slots = Slots([Losing(losses)], Bill())
    for _ in range(4):
        losses.append(lost())
        assert slots.submit(WORK).result(10) is DONE


def test_worker_that_was_dead_before_is_not_held_against_the_work() -> None:
    place, bill = Losing([lost(by_work=False) for _ in range(5)]), Bill()
    assert Slots([place], bill).submit(WORK).result(10) is DONE
    assert bill.recoveries == 5


def test_no_replacement_is_an_error_of_the_work_and_billed_as_the_loss() -> None:
    def replace() -> None:
        raise ApportionError("a worker died when it was started")

    place, bill = Losing([Lost("memory", "", replace)]), Bill()
    slots = Slots([place], bill)
    with pytest.raises(ApportionError, match="when it was started"):
        slots.submit(WORK).result(10)
    assert bill.entries()["memory"][0] == 1
    assert slots.submit(WORK).result(10) is DONE


def test_work_that_is_lost_while_the_pool_closes_is_given_up() -> None:
    begun, closed = threading.Event(), threading.Event()

    def worker(work: Sequence[Evaluate]) -> list[Evaluation]:
        begun.set()
        closed.wait(10)
        raise lost()

    slots = Slots([worker], Bill())
    future = slots.submit(WORK)
    assert begun.wait(10)
    slots.cancel_waiting()
    closed.set()
    with pytest.raises(ApportionError, match="the pool was closed"):
        future.result(10)
    with pytest.raises(ApportionError, match="the pool is closed"):
        slots.submit(WORK)


def test_what_still_runs_at_the_end_is_billed_once() -> None:
    begun, released, bill = threading.Event(), threading.Event(), Bill()

    def worker(work: Sequence[Evaluate]) -> list[Evaluation]:
        begun.set()
        released.wait(10)
        return [DONE]

    slots = Slots([worker], bill)
    future = slots.submit(WORK)
    assert begun.wait(10)
    slots.cancel_waiting()
    slots.join(0.1)
    assert bill.entries()["cancelled"][0] == 1
    released.set()
    future.result(10)
    assert sum(count for count, _ in bill.entries().values()) == 1


def test_bill_is_the_time_of_a_place_that_never_rests() -> None:
    losses = [Lost("timeout", "", lambda: time.sleep(0.1)), Lost("died", "", lambda: None)]

    def worker(work: Sequence[Evaluate]) -> list[Evaluation]:
        time.sleep(0.05)
        if losses:
            raise losses.pop()
        return [DONE]

    bill = Bill()
    slots = Slots([worker], bill)
    begun = time.monotonic()
    futures = [slots.submit(WORK) for _ in range(8)]
    results = [future.result(10) for future in futures]
    wall = time.monotonic() - begun
    assert [result.error_class for result in results] == ["timeout"] + [None] * 7
    assert bill.busy_seconds == pytest.approx(wall, rel=0.02)
    assert bill.wasted_seconds == pytest.approx(0.2, rel=0.3)


class Counting:
    """A worker that is handed several at once, and may be held."""

    def __init__(self) -> None:
        self.handed: list[int] = []
        self.held = threading.Event()

    def __call__(self, works: Sequence[Evaluate]) -> list[Evaluation]:
        self.handed.append(len(works))
        self.held.wait(10)
        return [DONE for _ in works]


def test_short_work_goes_together_and_leaves_enough_for_others() -> None:
    places, bill = [Counting(), Counting()], Bill()
    slots = Slots(places, bill, together=lambda work: 4)
    first = [slots.submit(WORK) for _ in range(2)]
    while sum(len(place.handed) for place in places) < 2:
        time.sleep(0.01)
    rest = [slots.submit(WORK) for _ in range(6)]
    for place in places:
        place.held.set()
    assert all(future.result(10) is DONE for future in [*first, *rest])
    assert sum(sum(place.handed) for place in places) == bill.entries()["done"][0] == 8
    assert all(max(place.handed) in (2, 3) for place in places if len(place.handed) > 1)


def test_of_what_is_lost_together_nothing_is_blamed() -> None:
    poison = Evaluate({"a": "poison"}, "search", 0, 8)
    bill, held = Bill(), threading.Event()

    def worker(works: Sequence[Evaluate]) -> list[Evaluation]:
        held.wait(10)
        if poison in works:
            raise lost()
        return [DONE for _ in works]

    slots = Slots([worker], bill, together=lambda work: 8)
    futures = [slots.submit(work) for work in (WORK, WORK, poison, WORK)]
    held.set()
    classes = [future.result(10).error_class for future in futures]
    assert classes == [None, None, "died", None]
    assert bill.entries()["done"][0] == 3
    assert bill.entries()["died"][0] in (2, 3)  # with others, and twice alone


def test_work_waits_for_no_place_that_waits_itself() -> None:
    """The place that lost it is the only one here, so it gets it back."""
    come, losses = threading.Event(), [lost(place_may_wait=True)]
    places = [Losing(losses), Losing([])]

    def begin(place: int) -> None:
        if place == 1:
            come.wait(10)

    slots = Slots(places, Bill(), begin=begin)
    assert slots.submit(WORK).result(10) is DONE
    assert places[0].calls == 2
    come.set()


def test_lost_work_does_not_wait_for_the_next_worker() -> None:
    come = threading.Event()
    losses = [Lost("died", "", lambda: come.wait(10) and None, place_may_wait=True)]  # type: ignore[func-returns-value]
    slots = Slots([Losing(losses), Losing(losses)], Bill())
    assert slots.submit(WORK).result(5) is DONE
    come.set()


def test_last_place_that_leaves_takes_all_work_with_it() -> None:
    def begin(place: int) -> None:
        raise ApportionError("no node is fit")

    slots = Slots([Losing([]), Losing([])], Bill(), begin=begin)
    with pytest.raises(ApportionError, match="no node is fit"):
        slots.submit(WORK).result(10)
