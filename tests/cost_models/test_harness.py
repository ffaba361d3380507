"""The timing harness, on clocks that only advance when a false operator runs."""

import math

import numpy as np
import pytest

from apportion.cost_models.harness import Measurement, compare, median_interval


class FalseClock:
    """Tells the seconds that its operators have claimed."""

    def __init__(self, seed: int = 0) -> None:
        self.now = 0.0
        self.drift = 1.0
        self.generator = np.random.default_rng(seed)

    def __call__(self) -> float:
        return self.now

    def operator(self, seconds: float, noise: float = 0.0):
        def call() -> None:
            self.now += seconds * self.drift * math.exp(noise * self.generator.standard_normal())

        return call


def timed(clock: FalseClock, calls, reference, seconds=0.5, half_width=0.01):
    return compare(calls, reference, seconds=seconds, half_width=half_width, seed=0, clock=clock)


def test_compare_known_ratios_are_exact() -> None:
    clock = FalseClock()
    calls = {"half": clock.operator(5e-4), "twice": clock.operator(2e-3)}
    found = timed(clock, calls, clock.operator(1e-3))
    assert found["half"].ratio == pytest.approx(0.5)
    assert found["twice"].milliseconds == pytest.approx(2.0)
    assert found["twice"].stopped_by == "width"


def test_compare_drifting_clock_keeps_the_ratio() -> None:
    clock = FalseClock()

    def slowing(seconds):
        call = clock.operator(seconds, 0.01)

        def once() -> None:
            clock.drift *= 1.003
            call()

        return once

    found = timed(clock, {"a": slowing(8e-4)}, slowing(1e-3), half_width=1e-9)
    assert found["a"].ratio == pytest.approx(0.8, rel=0.01)


def test_compare_interruptions_do_not_move_the_median() -> None:
    clock = FalseClock()
    plain = clock.operator(1e-3, 0.01)

    def interrupted() -> None:
        plain()
        clock.now += 0.02 * (clock.generator.random() < 0.2)

    found = timed(clock, {"a": interrupted}, clock.operator(1e-3, 0.01), seconds=2.0)
    assert found["a"].ratio == pytest.approx(1.0, rel=0.02)


def test_compare_noise_stops_by_time_within_budget() -> None:
    clock = FalseClock()
    calls = {str(n): clock.operator(1e-3, 0.5) for n in range(8)}
    found = timed(clock, calls, clock.operator(1e-3, 0.5), half_width=1e-6)
    assert {m.stopped_by for m in found.values()} == {"time"}
    assert clock.now < 8 * 0.5 * 1.3


def test_compare_short_calls_are_batched() -> None:
    clock = FalseClock()
    counted = []

    def call() -> None:
        counted.append(1)
        clock.now += 1e-6

    found = timed(clock, {"a": call}, clock.operator(1e-3), seconds=0.05)
    assert len(counted) >= 50 * found["a"].pairs
    assert found["a"].ratio == pytest.approx(1e-3)


def test_compare_same_seed_gives_equal_measurements() -> None:
    def once() -> dict[str, Measurement]:
        clock = FalseClock(3)
        return timed(clock, {"a": clock.operator(1e-3, 0.1)}, clock.operator(1e-3, 0.1))

    assert once() == once()


def test_interval_covers_the_median_in_nine_of_ten() -> None:
    generator = np.random.default_rng(1)
    covered = 0
    for _ in range(300):
        low, high = median_interval(generator.standard_normal(40), generator)
        covered += low <= 0 <= high
    assert covered / 300 >= 0.9


def test_measurement_survives_json() -> None:
    measurement = Measurement(0.5, 0.4, 0.6, 1.0, 9, "time")
    assert Measurement.from_json(measurement.to_json()) == measurement
    assert measurement.reference_milliseconds == pytest.approx(2.0)
