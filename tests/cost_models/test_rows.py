"""Milliseconds by class: what a correction multiplies is what a configuration is predicted by."""

from itertools import product

import numpy as np
import pytest

from apportion.cost_models.rows import ClassRows
from apportion.cost_models.sampling import Shape

# A sub-block with two treatments, of whose time 2 and 1 ms are its own, above one layer.
ROWS = np.array([[3.0, 0.0, 6.0, 4.0], [5.0, 4.0, np.inf, np.inf]])
BESIDE = np.array([[0.0, 0.0, 2.0, 1.0], [0.0] * 4])
NUMBERS = np.array([[2, 2, 1, 1], [0, 1, 0, 0]])
VOIDING = np.array([[False, True, True, True], [False] * 4])


@pytest.fixture
def rows() -> ClassRows:
    return ClassRows(ROWS, BESIDE, NUMBERS, structure=2, classes=3)


@pytest.fixture
def shape() -> Shape:
    return Shape(np.array([4, 2]), np.array([-1, 0]), VOIDING)


def test_own_work_of_a_treated_sub_block_is_of_the_class_of_structure(rows, shape) -> None:
    assert rows.of((0, 0), shape).tolist() == [5.0, 0.0, 3.0]
    assert rows.of((0, 1), shape).tolist() == [0.0, 4.0, 3.0]
    assert rows.of((2, 1), shape).tolist() == [0.0, 4.0, 2.0]
    assert rows.of((3, 0), shape).tolist() == [0.0, 3.0, 1.0]


def test_corrected_rows_add_up_to_the_corrected_classes(rows, shape) -> None:
    factor = np.array([0.9, 1.1, 1.3])
    corrected = rows.corrected(ROWS, factor)
    assert np.array_equal(np.isinf(corrected), np.isinf(ROWS))
    for config in product(range(4), range(2)):
        there = ~shape.void(config)
        total = corrected[np.arange(2), config][there].sum()
        assert total == pytest.approx(factor @ rows.of(config, shape))
