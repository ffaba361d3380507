"""The whole-model correction against planted factors, and the margin's promise by simulation."""

import numpy as np
import pytest

from apportion.cost_models.correction import (
    Observations,
    corrected,
    fit,
    leave_one_out,
    margin,
    predict,
)

PLANTED = np.array([1.0, 0.8, 1.3])


def observations(count: int, noise: float, seed: int = 0, anchors: int = 0) -> Observations:
    generator = np.random.default_rng(seed)
    parts = generator.uniform(0.1, 3.0, size=(count, 3))
    dense_parts, dense = np.array([4.0, 0.0, 0.0]), 10.0
    true = dense + (parts - dense_parts) @ PLANTED
    measured = true * np.exp(noise * generator.standard_normal(count))
    return Observations(parts, measured, dense_parts, dense, anchors)


def test_correction_recovers_planted_factors() -> None:
    assert fit(observations(30, 0.0), 1e-9) == pytest.approx(PLANTED, abs=1e-6)


def test_correction_chosen_strength_is_close_under_noise() -> None:
    assert corrected(observations(30, 0.01)) == pytest.approx(PLANTED, abs=0.05)


def test_correction_dense_configuration_is_exact() -> None:
    seen = observations(12, 0.2)
    assert predict(seen, corrected(seen), seen.dense_parts) == pytest.approx(seen.dense)


def test_correction_without_configurations_is_none() -> None:
    assert corrected(observations(0, 0.0)).tolist() == [1, 1, 1]


def test_correction_strong_pull_stays_at_one() -> None:
    assert fit(observations(5, 0.3), 1e9) == pytest.approx(np.ones(3), abs=1e-6)


def test_left_out_configuration_is_not_fitted() -> None:
    seen = observations(20, 0.0)
    spoiled = seen.measured.copy()
    spoiled[7] *= 3
    other = Observations(seen.parts, spoiled, seen.dense_parts, seen.dense)
    rest = other.without(7)
    expected = predict(rest, corrected(rest), other.parts[7])
    assert leave_one_out(other)[7] == pytest.approx(expected)
    assert leave_one_out(other)[7] == pytest.approx(seen.measured[7], rel=0.01)


def test_anchors_are_fitted_and_not_judged() -> None:
    assert len(leave_one_out(observations(10, 0.01, anchors=3))) == 7


def test_margin_covers_nine_of_ten_new_configurations() -> None:
    generator = np.random.default_rng(0)
    covered = []
    for _ in range(2000):
        errors = np.exp(0.05 * generator.standard_normal(25))
        covered.append(errors[24] <= 1 + margin(errors[:24], np.ones(24)))
    assert 0.89 <= np.mean(covered) <= 0.97


@pytest.mark.parametrize(("count", "expected"), [(19, 0.1), (20, 0.0)], ids=["few", "enough"])
def test_margin_too_slow_predictions_is_never_negative(count: int, expected: float) -> None:
    assert margin(np.ones(count), np.full(count, 2.0)) == expected
