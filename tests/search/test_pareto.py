"""The front, against its definition."""

import numpy as np

from apportion.search.pareto import front


def by_definition(points):
    finite = [i for i, p in enumerate(points) if np.isfinite(p).all()]
    return [
        i in finite
        and not any(
            (points[j] <= points[i]).all() and (points[j] < points[i]).any() for j in finite
        )
        for i in range(len(points))
    ]


def test_front_equals_its_definition_with_ties():
    rng = np.random.default_rng(0)
    for _ in range(300):
        points = rng.integers(0, 5, (rng.integers(0, 25), rng.integers(1, 4))).astype(float)
        assert front(points).tolist() == by_definition(points)


def test_front_never_holds_a_value_that_is_not_finite():
    points = np.array([[0.0, np.inf], [np.nan, 0.0], [1.0, 1.0], [-np.inf, 5.0]])
    assert front(points).tolist() == [False, False, True, False]


def test_front_keeps_equal_points():
    assert front(np.ones((3, 2))).all()
