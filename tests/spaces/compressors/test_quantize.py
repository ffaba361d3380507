"""Codes, scales and zeros against float64 oracles of the weighted error."""

import time
from itertools import product

import pytest
import torch

from apportion.kernels.codes import TERNARY_BITS, middle
from apportion.spaces.compressors.quantize import quantize


def _case(out=32, inputs=128, seed=0):
    random = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, inputs, generator=random) * 0.05
    weight[::5, 3] *= 8
    return weight, torch.rand(inputs, generator=random, dtype=torch.float64) * 2 + 0.1


def _dequantized(quantized, bits):
    size = quantized.codes.shape[1] // quantized.scale.shape[1]
    scale = quantized.scale.double().repeat_interleave(size, 1)
    values = (quantized.codes.double() - middle(bits)) * scale
    if quantized.zero is not None:
        values += quantized.zero.double().repeat_interleave(size, 1)
    return values


def _plain(weight, bits, group, symmetric):
    """Minimum-maximum round to nearest with bfloat16 scale and zero, in float64."""
    x = weight.reshape(-1, group).double()
    top = 2 ** (bits - 1)
    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    if symmetric:
        scale = (x.abs().amax(1, keepdim=True) / (top - 1)).bfloat16().double()
        zero = torch.zeros_like(scale)
    else:
        scale = ((high - low) / (2 * top - 1)).bfloat16().double()
        zero = (low + top * scale).bfloat16().double()
    codes = ((x - zero) / scale).round().clamp(-top, top - 1)
    return (codes * scale + zero).reshape(weight.shape)


def _error(weight, values, importance):
    return float(((weight.double() - values).square() * importance).sum())


@pytest.mark.parametrize(
    "bits, symmetric",
    [(2, False), (3, False), (4, False), (4, True), (5, False), (5, True), (6, False), (6, True)],
)
@pytest.mark.parametrize("group", [32, 128])
def test_quantize_is_never_worse_than_plain_in_any_group(bits, symmetric, group):
    weight, importance = _case()
    values = _dequantized(quantize(weight, bits, group, symmetric, None, importance), bits)
    losses = [
        ((weight.double() - v).square() * importance).reshape(-1, group).sum(1)
        for v in (values, _plain(weight, bits, group, symmetric))
    ]
    assert (losses[0] <= losses[1] * (1 + 1e-5)).all()


@pytest.mark.parametrize("bits, share", [(2, 0.55), (3, 0.75), (4, 0.87), (5, 0.94), (6, 0.97)])
def test_quantize_beats_plain_by_a_stated_share(bits, share):
    weight, importance = _case()
    values = _dequantized(quantize(weight, bits, 64, False, None, importance), bits)
    plain = _plain(weight, bits, 64, False)
    assert _error(weight, values, importance) < share * _error(weight, plain, importance)


@pytest.mark.parametrize("symmetric", [False, True])
def test_quantize_chooses_the_nearest_code_of_the_stored_scale_and_zero(symmetric):
    weight, importance = _case(8, 32)
    quantized = quantize(weight, 3, 16, symmetric, None, importance)
    nearest = torch.full(weight.shape, torch.inf, dtype=torch.float64)
    for code in range(8):
        every = type(quantized)(torch.full_like(quantized.codes, code), *_scales(quantized))
        nearest = nearest.minimum((_dequantized(every, 3) - weight).abs())
    assert ((_dequantized(quantized, 3) - weight).abs() <= nearest + 1e-7).all()


def _scales(quantized):
    return quantized.scale, quantized.zero


def test_quantize_weighs_the_error_by_the_inputs():
    weight, importance = _case()
    weighted = _dequantized(quantize(weight, 3, 64, importance=importance**3), 3)
    alike = _dequantized(quantize(weight, 3, 64), 3)
    assert _error(weight, weighted, importance**3) < 0.95 * _error(weight, alike, importance**3)
    assert _error(weight, alike, 1) < _error(weight, weighted, 1)


def test_quantize_fits_the_kept_weights_only():
    weight, importance = _case()
    kept = weight.abs() > weight.abs().median()
    polluted = torch.where(kept, weight, 100.0)
    first = quantize(torch.where(kept, weight, 0), 3, 64, False, kept, importance)
    second = quantize(polluted, 3, 64, False, kept, importance)
    assert torch.equal(first.scale, second.scale) and torch.equal(first.zero, second.zero)
    assert torch.equal(first.codes[kept], second.codes[kept])


@pytest.mark.parametrize(
    "bits, symmetric", [(2, False), (4, False), (6, False), (3, True), (8, True), (1.58, True)]
)
@pytest.mark.parametrize("value", [0.0, 0.37, -1e-30, 1e4])
def test_quantize_of_a_constant_group_is_exact_to_bfloat16(bits, symmetric, value):
    weight = torch.full((2, 32), value)
    values = _dequantized(quantize(weight, bits, 16, symmetric), bits)
    assert (values - weight.double()).abs().max() <= abs(value) * 2**-8


def test_quantize_of_a_group_without_kept_weights_is_finite():
    weight, _ = _case(4, 32)
    kept = torch.ones_like(weight, dtype=torch.bool)
    kept[1, :16] = False
    for bits in (TERNARY_BITS, 2):
        quantized = quantize(weight, bits, 16, bits == TERNARY_BITS, kept)
        assert _dequantized(quantized, bits).isfinite().all()


@pytest.mark.parametrize("bits", [3, 5, 8])
def test_quantize_symmetric_is_exact_on_its_own_grid(bits):
    random = torch.Generator().manual_seed(0)
    codes = torch.randint(1 - 2 ** (bits - 1), 2 ** (bits - 1), (4, 64), generator=random)
    codes[:, 0] = 1 - 2 ** (bits - 1)
    quantized = quantize(codes * 0.25, bits, None, True)
    assert torch.equal(_dequantized(quantized, bits), codes.double() * 0.25)


def test_quantize_at_8_bits_keeps_scales_positive_and_code_minus_128_unused():
    weight, importance = _case()
    quantized = quantize(-weight.abs(), 8, None, True, None, importance)
    assert (quantized.scale > 0).all() and int(quantized.codes.min()) >= 1


def test_quantize_of_unseen_inputs_still_rounds_them_sanely():
    weight, importance = _case()
    importance[5:9] = 0
    values = _dequantized(quantize(weight, 4, 64, importance=importance), 4)
    assert (values - weight).abs().max() < 0.25 * weight.abs().max()


@pytest.mark.parametrize("weighted", [True, False])
def test_quantize_ternary_is_the_best_of_all_codes_but_for_the_rounded_scale(weighted):
    weight, importance = _case(24, 16)
    group, says = 8, importance if weighted else torch.ones(16, dtype=torch.float64)
    quantized = quantize(weight, TERNARY_BITS, group, True, None, says)
    x, h = (t.double().reshape(-1, group) for t in (weight, says.expand(24, 16)))
    every = torch.tensor(list(product((-1.0, 0.0, 1.0), repeat=group)), dtype=torch.float64)
    gain = ((h * x) @ every.T).square() / (h @ every.square().T).clamp_min(1e-300)
    least = (h * x.square()).sum(1) - gain.amax(1)
    lost = h * (x - _dequantized(quantized, TERNARY_BITS).reshape(-1, group)).square()
    scale = quantized.scale.double().reshape(-1)
    assert (lost.sum(1) <= least + (scale * 2**-8).square() * h.sum(1)).all()
    assert (lost.sum(1) >= least * (1 - 1e-9)).all()


def test_quantize_ternary_is_exact_on_its_own_grid_and_has_no_zeros():
    random = torch.Generator().manual_seed(0)
    codes = torch.randint(-1, 2, (4, 64), generator=random)
    quantized = quantize(codes * 0.375, TERNARY_BITS, 16, True)
    assert quantized.zero is None and torch.equal(quantized.codes, (codes + 1).to(torch.uint8))
    assert torch.equal(_dequantized(quantized, TERNARY_BITS), codes.double() * 0.375)


def test_quantize_ternary_fits_the_kept_weights_only():
    weight, importance = _case()
    kept = weight.abs() > weight.abs().median()
    first, second = (
        quantize(torch.where(kept, weight, other), TERNARY_BITS, 64, True, kept, importance)
        for other in (0.0, 100.0)
    )
    assert torch.equal(first.scale, second.scale)
    assert torch.equal(first.codes[kept], second.codes[kept])


@pytest.mark.parametrize("bits, symmetric", [(3, False), (6, False), (TERNARY_BITS, True)])
def test_quantize_of_rows_does_not_depend_on_other_rows(bits, symmetric):
    weight, importance = _case(2100, 64)
    whole = quantize(weight, bits, 32, symmetric, importance=importance)
    part = quantize(weight[1500:1600], bits, 32, symmetric, importance=importance)
    assert torch.equal(whole.codes[1500:1600], part.codes)


def test_quantize_of_a_large_matrix_is_quick():
    weight, importance = _case(1024, 192)
    start = time.process_time()
    quantize(weight, 3, 64, importance=importance)
    assert time.process_time() - start < 2  # 0.05 s on one idle thread
