"""The volume that a front dominates against its definition, and how fronts are compared."""

import math
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from apportion.studies.database.rows import Evaluation

ROOT = Path(__file__).parents[2]
SIDE = 5
grid_points = st.lists(st.tuples(*[st.integers(0, SIDE)] * 3), max_size=8)


@pytest.fixture(scope="module")
def fronts() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        import _fronts

        yield _fronts


def cells_dominated(points: list[tuple[int, ...]]) -> int:
    """How many unit cells of the box below SIDE have a point in or before their lowest corner."""
    return sum(
        any(all(p <= c for p, c in zip(point, cell, strict=True)) for point in points)
        for cell in product(range(SIDE), repeat=3)
    )


@given(points=grid_points)
def test_hypervolume_is_the_number_of_dominated_cells(
    fronts: ModuleType, points: list[tuple[int, ...]]
) -> None:
    array = np.array(points, dtype=float).reshape(-1, 3)
    assert fronts.hypervolume(array, np.full(3, float(SIDE))) == cells_dominated(points)


@given(points=grid_points, scale=st.tuples(*[st.floats(0.1, 10)] * 3))
def test_hypervolume_scales_with_each_criterion(
    fronts: ModuleType, points: list[tuple[int, ...]], scale: tuple[float, ...]
) -> None:
    array, by = np.array(points, dtype=float).reshape(-1, 3), np.array(scale)
    found = fronts.hypervolume(array * by, SIDE * by)
    assert found == pytest.approx(cells_dominated(points) * math.prod(scale), rel=1e-12)


def test_hypervolume_of_points_outside_the_reference_is_zero(fronts: ModuleType) -> None:
    outside = np.array([[0.0, 0.0, 1.0], [2.0, 0.0, 0.0], [np.nan, 0.0, 0.0], [-np.inf, 0.0, 0.0]])
    assert fronts.hypervolume(outside, np.ones(3)) == 0


def point(fronts: ModuleType, losses: list[float], size: float, latency: float) -> Any:
    evaluation = Evaluation(np.array(losses), np.ones(len(losses)), None, 0.0)
    return fronts.Point("given", float(np.mean(losses)), size, latency, evaluation)


def test_least_excess_is_of_the_best_joint_point_that_is_neither_larger_nor_slower(
    fronts: ModuleType,
) -> None:
    axis = point(fronts, [1.0, 2.0, 3.0, 4.0], 0.5, 0.5)
    larger = point(fronts, [0.0, 0.0, 0.0, 0.0], 0.6, 0.5)
    slower = point(fronts, [0.0, 0.0, 0.0, 0.0], 0.5, 0.6)
    worse = point(fronts, [1.2, 2.2, 3.1, 4.1], 0.5, 0.4)
    worst = point(fronts, [3.2, 4.2, 5.1, 6.1], 0.4, 0.5)
    # differences 0.2, 0.2, 0.1, 0.1: mean 0.15, deviation 0.05 x sqrt(4 / 3), over sqrt(4)
    expected = 0.15 / (0.05 * math.sqrt(4 / 3) / 2)
    joint = [larger, slower, worst, worse]
    assert fronts.least_excess(axis, joint, None) == pytest.approx(expected, rel=1e-12)
    assert fronts.excess(axis, worse, None) == pytest.approx(-expected, rel=1e-12)
    assert fronts.least_excess(axis, [larger, slower], None) == math.inf
    assert fronts.least_excess(axis, [axis], None) == 0


def test_losses_too_small_to_matter_are_all_alike(fronts: ModuleType) -> None:
    least = fronts.LEAST_KL
    small = point(fronts, [0.1 * least, 0.1 * least], 0.5, 0.5)
    other = point(fronts, [0.8 * least, 0.9 * least], 0.5, 0.5)
    above = point(fronts, [1.8 * least, 1.9 * least], 0.5, 0.5)
    assert fronts.excess(other, small, None) == 0
    assert fronts.excess(above, small, None) > 2
    assert small.criteria == other.criteria


def test_inside_the_reference_box_nothing_is_worse_than_the_reference(fronts: ModuleType) -> None:
    good = point(fronts, [1.0, 2.0], 0.5, 1.0)
    useless = [point(fronts, [9.0, 9.0], 0.1, 0.1), point(fronts, [0.1, 0.1], 1.1, 0.5)]
    assert fronts.inside([good, *useless], 5.0) == [good]


def test_points_that_are_beaten_in_every_respect_are_not_of_the_front(fronts: ModuleType) -> None:
    good = point(fronts, [1.0, 2.0], 0.5, 0.5)
    beaten = point(fronts, [1.0, 3.0], 0.6, 0.5)
    small = point(fronts, [4.0, 5.0], 0.4, 0.5)
    assert fronts.non_dominated([beaten, good, small]) == [good, small]
