"""Low-rank pairs against their closed forms in float64."""

from decimal import Decimal

import pytest
import torch

from apportion.spaces.compressors.factorize import low_rank, rank_of
from apportion.spaces.compressors.residual import residual_pair


def _case(out, inputs, tokens=200, seed=0):
    random = torch.Generator().manual_seed(seed)
    mix = torch.randn(inputs, inputs, generator=random, dtype=torch.float64)
    x = torch.randn(tokens, inputs, generator=random, dtype=torch.float64) @ mix
    return torch.randn(out, inputs, generator=random), x


def _output_error(weight, pair, x):
    left, right = pair
    return float(((weight.double() - left.double() @ right.double()) @ x.T).square().sum())


def test_rank_of_is_rounded_down_to_the_multiple():
    # 50 % of 192 * 512 is 49152 parameters, and 704 a rank: 69.8
    assert [rank_of(Decimal(50), 192, 512, m) for m in (1, 8, 16)] == [69, 64, 64]
    assert rank_of(Decimal(100), 16, 16, 8) == 8


@pytest.mark.parametrize("out, inputs", [(24, 40), (40, 24), (32, 32)])
def test_low_rank_plain_reaches_the_tail_of_the_singular_values(out, inputs):
    weight, _ = _case(out, inputs)
    error = _output_error(weight, low_rank(weight, 8, None), torch.eye(inputs).double())
    tail = torch.linalg.svdvals(weight.double())[8:].square().sum()
    assert error == pytest.approx(float(tail), rel=1e-9)


@pytest.mark.parametrize("out, inputs", [(24, 40), (40, 24), (32, 32)])
def test_low_rank_whitened_reaches_the_optimum_in_the_activation_norm(out, inputs):
    weight, x = _case(out, inputs)
    error = _output_error(weight, low_rank(weight, 8, x.T @ x), x)
    optimum = torch.linalg.svdvals(weight.double() @ x.T)[8:].square().sum()
    assert error == pytest.approx(float(optimum), rel=1e-4)
    assert error < 0.9 * _output_error(weight, low_rank(weight, 8, None), x)


def test_low_rank_whitened_is_optimal_where_the_second_moment_is_singular():
    weight, x = _case(24, 40, tokens=12)
    assert _output_error(weight, low_rank(weight, 12, x.T @ x), x) < 1e-9 * float(
        (weight.double() @ x.T).square().sum()
    )
    optimum = torch.linalg.svdvals(weight.double() @ x.T)[8:].square().sum()
    error = _output_error(weight, low_rank(weight, 8, x.T @ x), x)
    assert error == pytest.approx(float(optimum), rel=1e-3)


def test_low_rank_without_any_input_is_plain():
    weight, _ = _case(16, 20)
    left, right = low_rank(weight, 4, torch.zeros(20, 20, dtype=torch.float64))
    plain = low_rank(weight, 4, None)
    assert torch.allclose(left @ right, plain[0] @ plain[1])


def test_low_rank_of_zeros_is_zero():
    left, right = low_rank(torch.zeros(8, 12), 2, None)
    assert torch.count_nonzero(left @ right) == 0


def test_residual_pair_repairs_a_low_rank_loss_to_bfloat16():
    weight, x = _case(24, 40)
    left, right = low_rank(weight, 4, None)
    pair = residual_pair(weight, (weight.double() - left @ right).float(), 4, x.T @ x)
    assert pair[0].dtype == pair[1].dtype == torch.bfloat16
    difference = (pair[0].double() @ pair[1].double() - left @ right).norm()
    assert difference < 0.01 * (left @ right).norm()


def test_residual_pair_of_nothing_lost_is_finite_zero():
    weight, _ = _case(8, 12)
    left, right = residual_pair(weight, weight, 2, None)
    assert torch.count_nonzero(left.float() @ right.float()) == 0


def test_low_rank_of_a_slightly_indefinite_moment_is_finite() -> None:
    rows = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    moment = (rows.T @ rows).double() - 1e-4 * torch.eye(64, dtype=torch.float64)
    left, right = low_rank(torch.randn(8, 64), 4, moment)
    assert torch.isfinite(left @ right).all()
