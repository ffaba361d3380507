"""Predicting inputs from later ones, and giving them the errors of those before."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from apportion.errors import InvalidInput
from apportion.spaces.compressors.compensate import compensate, regression
from apportion.spaces.compressors.gptq import gptq
from apportion.spaces.compressors.sparsegpt import sparsegpt


def _inputs(seed=0, tokens=90, inputs=24):
    random = torch.Generator().manual_seed(seed)
    mixing = torch.randn(inputs, inputs, generator=random, dtype=torch.float64)
    return torch.randn(tokens, inputs, generator=random, dtype=torch.float64) @ mixing


def _damped(moment):
    """1 % of the mean diagonal on the diagonal, as GPTQ's and SparseGPT's `percdamp`."""
    return moment + 0.01 * moment.diagonal().mean() * torch.eye(len(moment), dtype=torch.float64)


@pytest.mark.parametrize("by_activity", [False, True])
def test_regression_is_least_squares_on_the_later_inputs(by_activity):
    x = _inputs()
    mean_square = (x.T @ x).diagonal().mean()
    found = regression(x.T @ x, by_activity=by_activity)
    # Rows that add 1 % of the mean to the diagonal of the moment and nothing else.
    damping = 0.1 * mean_square.sqrt() * torch.eye(24, dtype=torch.float64)
    ordered = torch.cat([x, damping])[:, found.order]
    for j in range(24):
        target, later = ordered[:, j], ordered[:, j + 1 :]
        best = torch.linalg.lstsq(later, target[:, None]).solution[:, 0]
        torch.testing.assert_close(found.coefficients[j, j + 1 :].double(), best, rtol=0, atol=1e-5)
        left = (target - later @ best).square().sum() / mean_square
        assert float(found.unpredicted[j]) == pytest.approx(float(left), rel=1e-5)
    assert not found.coefficients.tril().any()


def test_regression_by_activity_takes_equal_inputs_in_their_order():
    moment = torch.diag(torch.tensor([2.0, 5, 2, 0, 5, 2], dtype=torch.float64))
    assert regression(moment, by_activity=True).order.tolist() == [1, 4, 0, 2, 5, 3]
    assert regression(moment, by_activity=False).order.tolist() == list(range(6))


def test_regression_leaves_dead_inputs_out():
    x = _inputs()
    x[:, [3, 17]] = 0
    live = [i for i in range(24) if i not in (3, 17)]
    whole = regression(x.T @ x, by_activity=False)
    alone = regression(x[:, live].T @ x[:, live], by_activity=False)
    assert not whole.unpredicted[[3, 17]].any()
    assert not whole.coefficients[[3, 17]].any() and not whole.coefficients[:, [3, 17]].any()
    torch.testing.assert_close(whole.coefficients[live][:, live], alone.coefficients)
    torch.testing.assert_close(whole.unpredicted[live], alone.unpredicted)


def test_regression_without_any_live_input_counts_all_alike():
    found = regression(torch.zeros(5, 5, dtype=torch.float64), by_activity=True)
    assert not found.coefficients.any()
    assert found.unpredicted.unique().numel() == 1 and found.unpredicted[0] > 0


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_regression_does_not_depend_on_the_unit_of_the_inputs(scale):
    x = _inputs()
    one, other = (regression(x.T @ x * s, by_activity=True) for s in (1.0, scale))
    torch.testing.assert_close(one.coefficients, other.coefficients)
    torch.testing.assert_close(one.unpredicted, other.unpredicted)


@given(st.floats(0, 100), st.integers(0, 9))
def test_regression_of_an_indefinite_moment_is_finite(excess, seed):
    x = _inputs(seed, tokens=3)
    moment = x.T @ x
    moment = moment - excess * moment.diagonal().mean() * torch.ones_like(moment) / 24
    found = regression(moment, by_activity=False)
    assert found.coefficients.isfinite().all() and found.unpredicted.isfinite().all()
    assert (found.unpredicted[moment.diagonal() > 0] > 0).all()


def test_regression_refuses_a_moment_that_is_not_finite():
    moment = torch.eye(4, dtype=torch.float64)
    moment[1, 2] = torch.nan
    with pytest.raises(InvalidInput, match="not finite"):
        regression(moment, by_activity=False)


@given(st.integers(0, 99), st.sampled_from([1, 7, 24, 128]))
def test_compensate_loses_what_the_regression_leaves_unpredicted(seed, block):
    x = _inputs(seed)
    moment = x.T @ x
    prediction = regression(moment, by_activity=True)
    weight = torch.randn(5, 24, generator=torch.Generator().manual_seed(seed))
    columns = weight.T[prediction.order]
    errors = torch.empty_like(columns)

    def store(j):
        stored = columns[j].round()
        errors[j] = columns[j] - stored
        return stored

    compensate(columns, prediction.coefficients, store, block)
    lost = (weight - columns[prediction.order.argsort()].T).double()
    output_error = ((lost @ _damped(moment)) * lost).sum(1) / moment.diagonal().mean()
    unpredicted = (errors.square() * prediction.unpredicted[:, None]).sum(0)
    assert torch.equal(columns, columns.round())
    torch.testing.assert_close(unpredicted.double(), output_error, rtol=1e-4, atol=1e-8)


def test_all_levels_of_a_layer_share_the_factorization_of_their_method():
    x = _inputs()
    moment, weight = x.T @ x, torch.randn(8, 24, generator=torch.Generator().manual_seed(0))
    first = regression(moment, by_activity=False)
    for pattern in ((1, 2), (2, 4), (1, 4)):
        sparsegpt(weight, pattern, moment)
    assert regression(moment, by_activity=False) is first
    first = regression(moment, by_activity=True)
    for bits in (2, 3, 4):
        gptq(weight, bits, 8, False, moment)
    assert regression(moment, by_activity=True) is first


def test_factorization_of_an_indefinite_moment_is_that_of_one_raised_further():
    """By 1 % it is still indefinite, by 11 % it is not; the first attempt must leave no trace."""
    moment = torch.eye(96, dtype=torch.float64)
    moment[0, 1] = moment[1, 0] = 1.05
    found = regression(moment, by_activity=False)
    assert found.coefficients[0, 1].item() == pytest.approx(1.05 / 1.11, rel=1e-6)
    assert found.unpredicted[1:].tolist() == pytest.approx([1.11] * 95)
