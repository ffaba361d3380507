"""Half-quadratic zeros against the published iteration, written anew in its own terms."""

import pytest
import torch

from apportion.spaces.compressors.hqq import hqq

P = 0.7


def _matrix(size, out=16, inputs=128, seed=0):
    """Heavy tails: a few large weights, as the method is meant for; `size` is their usual one."""
    random = torch.Generator().manual_seed(seed)
    normal = torch.randn(5, out, inputs, generator=random)
    return size * normal[0] / normal[1:].square().mean(0).sqrt()


def _published(weight, bits, group):
    """Zero points (in codes) of each step, and the step at which the authors stop.

    Codes 0 to 2^bits - 1 stand for (q - zero point) * scale. The scale is rounded to bfloat16
    first, as it is stored.
    """
    x, top = weight.double().reshape(-1, group), 2**bits - 1
    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    scale = ((high - low) / top).bfloat16().double()
    points, errors, beta = [-low / scale], [], 10.0
    for _ in range(20):
        q = (x / scale + points[-1]).round().clamp(0, top)
        lost = x - (q - points[-1]) * scale
        errors.append(float(lost.abs().mean()))
        threshold = torch.where(lost == 0, 0, lost.abs() ** (P - 1)) / beta
        shrunk = torch.sign(lost) * torch.relu(lost.abs() - threshold)
        points.append((q - (x - shrunk) / scale).mean(1, keepdim=True))
        beta *= 1.01
    rises = [step + 1 for step in range(1, 20) if errors[step] >= errors[step - 1]]
    return scale, points, min(rises, default=20)


def _zero(point, scale, bits):
    """A zero point as it is stored: (q - 2^(bits - 1)) * scale + zero."""
    return ((2 ** (bits - 1) - point) * scale).bfloat16()


def _errors(weight, bits, group, scale, zero):
    """Sum of |w - w_q|^p of each group, with the nearest codes."""
    x, top = weight.double().reshape(-1, group), 2 ** (bits - 1)
    scale, zero = scale.double().reshape(-1, 1), zero.double().reshape(-1, 1)
    codes = ((x - zero) / scale).round().clamp(-top, top - 1)
    return (x - codes * scale - zero).abs().pow(P).sum(1)


def _dequantized(quantized, bits):
    size = quantized.codes.shape[1] // quantized.scale.shape[1]
    scale, zero = (t.double().repeat_interleave(size, 1) for t in (quantized.scale, quantized.zero))
    return (quantized.codes.double() - 2 ** (bits - 1)) * scale + zero


CASES = [(bits, group, size) for bits in (2, 3, 4, 6) for group in (32, 128) for size in (0.02, 2)]


@pytest.mark.parametrize("bits, group, size", CASES)
def test_hqq_takes_the_best_zero_of_the_published_iteration(bits, group, size):
    weight = _matrix(size)
    quantized = hqq(weight, bits, group)
    scale, points, stop = _published(weight, bits, group)
    zeros = [_zero(point, scale, bits) for point in points]
    tried = torch.stack([_errors(weight, bits, group, scale, zero) for zero in zeros])
    found = _errors(weight, bits, group, quantized.scale, quantized.zero)
    assert torch.equal(quantized.scale.reshape(-1, 1).double(), scale)
    torch.testing.assert_close(found, tried.amin(0), rtol=1e-12, atol=0)
    assert float(found.sum()) <= float(tried[stop].sum())


@pytest.mark.parametrize("bits, group, size", CASES)
def test_hqq_loses_no_more_than_plain_rounding_in_any_group(bits, group, size):
    weight = _matrix(size)
    quantized = hqq(weight, bits, group)
    x, top = weight.reshape(-1, group).double(), 2 ** (bits - 1)
    low, high = x.amin(1), x.amax(1)
    scale = ((high - low) / (2 * top - 1)).bfloat16().double()
    plain = _errors(weight, bits, group, scale, (low + top * scale).bfloat16())
    lost = (weight.double() - _dequantized(quantized, bits)).abs().pow(P)
    lost = lost.reshape(-1, group).sum(1)
    assert (lost <= plain * (1 + 1e-12)).all()
    assert float(lost.sum()) < 0.99 * float(plain.sum())


def test_hqq_per_channel_is_one_group_a_row():
    weight = _matrix(0.02)
    whole, grouped = hqq(weight, 3), hqq(weight, 3, 128)
    assert whole.scale.shape == (16, 1) and torch.equal(whole.zero, grouped.zero)
    assert torch.equal(whole.codes, grouped.codes)


def test_hqq_fits_the_kept_weights_only():
    weight = _matrix(0.02)
    kept = weight.abs() > weight.abs().median()
    first = hqq(torch.where(kept, weight, 0), 3, 64, kept)
    second = hqq(torch.where(kept, weight, 100.0), 3, 64, kept)
    assert torch.equal(first.scale, second.scale) and torch.equal(first.zero, second.zero)
    assert torch.equal(first.codes[kept], second.codes[kept])


def test_hqq_of_rows_does_not_depend_on_other_rows():
    weight = _matrix(0.02, 2100, 64)
    whole, part = hqq(weight, 3, 32), hqq(weight[1500:1600], 3, 32)
    assert torch.equal(whole.codes[1500:1600], part.codes)
    assert torch.equal(whole.zero[1500:1600], part.zero)


@pytest.mark.parametrize("value", [0.0, 0.37, -1e-30, 1e4])
def test_hqq_of_a_constant_group_is_exact_to_bfloat16(value):
    weight = torch.full((2, 32), value)
    assert (_dequantized(hqq(weight, 4, 16), 4) - weight).abs().max() <= abs(value) * 2**-8


def test_hqq_of_a_group_without_kept_weights_is_finite():
    kept = torch.ones(4, 32, dtype=torch.bool)
    kept[1, :16] = False
    assert _dequantized(hqq(_matrix(0.02, 4, 32), 2, 16, kept), 2).isfinite().all()
