"""The time limit: it ends what hangs, and never what is only slow."""

from apportion.workers.patience import Patience


def test_first_limit_holds_until_enough_has_finished() -> None:
    patience = Patience(floor_seconds=2, factor=10, first_seconds=1000, enough=3)
    for _ in range(2):
        patience.learn(8, 1.0)
        assert patience.limit_seconds(8) == 1000
    patience.learn(8, 1.0)
    assert patience.limit_seconds(8) == 10


def test_first_limit_gives_way_to_slower_evaluations() -> None:
    patience = Patience(first_seconds=1000)
    patience.learn(8, 900.0)
    assert patience.limit_seconds(8) == 9000


def test_no_limit_is_below_the_floor() -> None:
    patience = Patience(floor_seconds=60, enough=1)
    patience.learn(8, 0.01)
    assert patience.limit_seconds(8) == 60


def test_longer_slices_have_longer_limits_and_shorter_ones_no_shorter() -> None:
    patience = Patience(floor_seconds=1, factor=10, enough=1)
    patience.learn(8, 4.0)
    assert patience.limit_seconds(80) == 400
    assert patience.limit_seconds(1) == 40


def test_many_quick_evaluations_do_not_shorten_the_limit() -> None:
    """Those that begin at a cached block take a hundredth of one that begins at the top."""
    patience = Patience(floor_seconds=1, factor=10, enough=5)
    patience.learn(8, 50.0)
    for _ in range(5000):
        patience.learn(8, 0.5)
    assert patience.limit_seconds(8) > 50.0


def test_limit_grows_with_a_machine_that_slows_down() -> None:
    """Each evaluation takes three times as long as the one before; none exceeds its limit."""
    patience = Patience(floor_seconds=1, factor=10, first_seconds=2, enough=1)
    seconds = 0.1
    for _ in range(10):
        assert seconds < patience.limit_seconds(8)
        patience.learn(8, seconds)
        seconds *= 3


def test_usual_seconds_are_the_median_of_its_like() -> None:
    patience = Patience()
    assert patience.usual_seconds(8) is None
    for seconds in (1.0, 2.0, 90.0):
        patience.learn(8, seconds)
    assert patience.usual_seconds(16) == 4.0
