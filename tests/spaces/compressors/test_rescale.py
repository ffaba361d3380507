"""Scales and zeros fitted to final codes: least squares of the outputs, never a worse error."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from apportion.spaces.compressors.quantize import Quantized, quantize
from apportion.spaces.compressors.rescale import rescale


def _case(seed=0, out=12, inputs=32, tokens=100):
    random = torch.Generator().manual_seed(seed)
    mixing = torch.randn(inputs, inputs, generator=random, dtype=torch.float64)
    x = torch.randn(tokens, inputs, generator=random, dtype=torch.float64) @ mixing + 2
    return torch.randn(out, inputs, generator=random) * 0.05, x


def _values(quantized, bits, kept):
    size = quantized.codes.shape[1] // quantized.scale.shape[1]
    scale = quantized.scale.double().repeat_interleave(size, 1)
    values = (quantized.codes.double() - 2 ** (bits - 1)) * scale
    if quantized.zero is not None:
        values += quantized.zero.double().repeat_interleave(size, 1)
    return values * kept


def _errors(weight, values, x):
    """Squared output error [out] on the inputs, and on 1 % of their mean square in every input."""
    damping = 0.01 * x.square().sum(0).mean()
    lost = weight.double() - values
    return (lost @ x.T).square().sum(1) + damping * lost.square().sum(1)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("sparse", [False, True])
def test_rescale_of_one_group_is_least_squares_of_the_outputs(symmetric, sparse):
    weight, x = _case()
    kept = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) > 0.5 * sparse
    start = quantize(weight, 3, None, symmetric, kept)
    found = rescale(weight, start, 3, x.T @ x, kept)
    damping = (0.01 * x.square().sum(0).mean()).sqrt() * torch.eye(32, dtype=torch.float64)
    outputs_of = torch.cat([x, damping])
    for row in range(12):
        one = kept[row].double()
        terms = [(start.codes[row].double() - 4) * one, one][: 2 - symmetric]
        columns = torch.stack([outputs_of @ term for term in terms], 1)
        target = outputs_of @ weight[row].double()
        best = torch.linalg.lstsq(columns, target[:, None]).solution[:, 0]
        assert float(found.scale[row]) == pytest.approx(float(best[0]), rel=2**-8)
        if not symmetric:
            rest = target - columns[:, 0] * found.scale[row].double()
            zero = float(columns[:, 1] @ rest / columns[:, 1].square().sum())
            assert float(found.zero[row]) == pytest.approx(zero, rel=2**-8, abs=1e-6)


@given(st.integers(0, 99), st.sampled_from([2, 4, 8]), st.booleans(), st.booleans())
def test_rescale_is_never_worse_in_any_row(seed, bits, symmetric, sparse):
    weight, x = _case(seed)
    kept = torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed)) > 0.5 * sparse
    start = quantize(weight, bits, 8, symmetric, kept)
    found = rescale(weight, start, bits, x.T @ x, kept)
    before, after = (_errors(weight, _values(q, bits, kept), x) for q in (start, found))
    assert (after <= before * (1 + 1e-4)).all()
    assert torch.equal(found.codes, start.codes) and (found.zero is None) == symmetric
    assert found.scale.dtype == torch.bfloat16 and found.scale.shape == start.scale.shape


def test_rescale_lowers_the_error_of_rounding_to_nearest_clearly():
    weight, x = _case()
    start = quantize(weight, 3, 8)
    every = torch.ones_like(weight)
    before, after = (
        _errors(weight, _values(q, 3, every), x).sum()
        for q in (start, rescale(weight, start, 3, x.T @ x))
    )
    assert after < 0.8 * before


def test_rescale_without_any_live_input_changes_nothing():
    weight, x = _case()
    start = quantize(weight, 3, 8)
    assert rescale(weight, start, 3, x.T @ x * 0) is start


@pytest.mark.parametrize("code", [0, 4])
def test_rescale_of_codes_all_alike_is_finite(code):
    weight, x = _case()
    start = quantize(weight, 3, 8)
    start = replace(start, codes=torch.full_like(start.codes, code))
    found = rescale(weight, start, 3, x.T @ x, torch.zeros_like(weight, dtype=torch.bool))
    assert torch.equal(found.scale, start.scale) and torch.equal(found.zero, start.zero)
    found = rescale(weight, start, 3, x.T @ x)
    before, after = (
        _errors(weight, _values(q, 3, torch.ones_like(weight)), x) for q in (start, found)
    )
    assert torch.equal(found.scale, start.scale) and (after <= before).all()


def test_rescale_leaves_its_arguments_alone():
    weight, x = _case()
    start = quantize(weight, 3, 8)
    copy = Quantized(start.codes.clone(), start.scale.clone(), start.zero.clone())
    moment = x.T @ x
    rescale(weight, start, 3, moment)
    assert torch.equal(moment, x.T @ x)
    assert torch.equal(start.scale, copy.scale) and torch.equal(start.zero, copy.zero)
