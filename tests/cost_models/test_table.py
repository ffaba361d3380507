"""Limits with their margin: what is promised, and what cancels."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from apportion.cost_models.table import guarded_limit, guarded_rows, padded

NO_DROPS = np.zeros((2, 2), dtype=bool)


def test_padded_shorter_rows_end_in_infinity() -> None:
    assert padded([[1, 2], [3]]).tolist() == [[1, 2], [3, np.inf]]


def test_guarded_limit_charges_what_is_above_the_base() -> None:
    assert guarded_limit(11.0, 1.0, 0.25) == pytest.approx(9.0)


@given(st.lists(st.floats(0.01, 100), min_size=2, max_size=6), st.floats(0, 0.5))
def test_guarded_rows_of_the_unit_are_its_own(values: list[float], m: float) -> None:
    rows = np.array([values, values[::-1]])
    drops = np.zeros_like(rows, dtype=bool)
    guarded = guarded_rows(rows, rows[:, 1], m, (-1, -1), drops)
    assert guarded[:, 1].tolist() == rows[:, 1].tolist()
    assert (guarded >= rows - 1e-12).all()


def test_guarded_rows_charge_what_differs() -> None:
    rows = np.array([[1.0, 3.0], [1.0, np.inf]])
    guarded = guarded_rows(rows, np.array([2.0, 1.0]), 0.25, (-1, -1), NO_DROPS)
    assert guarded.tolist() == [[2 - 1 / 1.25, 2 + 1 * 1.25], [1.0, np.inf]]


def test_guarded_rows_drop_owes_for_all_below() -> None:
    rows = np.array([[1.0, 0.0], [0.5, 0.0], [2.0, 1.0]])
    drops = np.array([[False, True], [False, True], [False, False]])
    guarded = guarded_rows(rows, rows[:, 0], 0.25, (-1, 0, 1), drops)
    everything_below = 1.0 + 0.5 + 2.0
    assert guarded[0, 1] == pytest.approx(everything_below - everything_below / 1.25)
    assert guarded[1, 1] == pytest.approx(2.5 - 2.5 / 1.25)


def test_table_imports_no_torch() -> None:
    code = "import sys, apportion.cost_models.table, apportion.cost_models.correction;"
    code += "import apportion.cost_models.sampling, apportion.cost_models.fingerprint;"
    subprocess.run([sys.executable, "-c", code + "assert 'torch' not in sys.modules"], check=True)
