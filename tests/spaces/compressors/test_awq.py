"""Scaled inputs against their definition in float64, on the inputs themselves."""

from decimal import Decimal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apportion.kernels.formats import LayerShape
from apportion.kernels.packing import unpack_mask
from apportion.kernels.reference import reference_weight
from apportion.spaces.compressors.awq import awq
from apportion.spaces.compressors.compose import InputStatistics, realize
from apportion.spaces.compressors.quantize import quantize
from apportion.spaces.compressors.sparsify import keep_largest
from apportion.spaces.grammar import parse_option

GRIDS = [(3, 32, False), (4, 64, True), (2, None, False), (1.58, 32, True), (8, None, True)]


def _case(spread=1.0, out=24, inputs=128, seed=0):
    """Weights and inputs x [tokens, in], whose root mean squares have `spread` decades."""
    random = torch.Generator().manual_seed(seed)
    weight = 0.1 * torch.randn(out, inputs, generator=random)
    mix = torch.eye(inputs).double() + 0.02 * torch.randn(inputs, inputs, generator=random)
    x = torch.randn(256, inputs, generator=random, dtype=torch.float64) @ mix
    return weight, x * 10 ** (spread * torch.rand(inputs, generator=random, dtype=torch.float64))


def _dequantized(codes, scale, zero, bits):
    """float64 [out, in], written out."""
    middle = 1 if bits == 1.58 else 2 ** (bits - 1)
    size = codes.shape[1] // scale.shape[1]
    values = (codes.double() - middle) * scale.double().repeat_interleave(size, 1)
    return values if zero is None else values + zero.double().repeat_interleave(size, 1)


def _error(weight, values, x):
    return float((x @ (weight.double() - values).T).square().sum())


def _by_definition(weight, x, bits, group, symmetric, kept):
    """(error, 1 / s as it is stored, what is stored of W diag(s)) for every alpha."""
    magnitude = x.square().mean(0).sqrt()
    for step in range(20):
        s = magnitude ** (step / 20)
        s = s / (s.max() * s.min()).sqrt()
        stored = (1 / s).bfloat16()
        scaled = (weight.double() / stored.double()).float()
        energy = (x * stored.double()).square().sum(0)
        found = quantize(scaled, bits, group, symmetric, kept, energy)
        values = _dequantized(found.codes, found.scale, found.zero, bits) * stored.double()
        values = values if kept is None else values.where(kept, 0)
        yield _error(weight, values, x), stored, found


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize(("bits", "group", "symmetric"), GRIDS)
def test_awq_takes_the_scales_of_the_power_that_loses_least(bits, group, symmetric, half):
    weight, x = _case()
    kept = keep_largest(weight, Decimal(50)) if half else None
    found = awq(weight, bits, group, symmetric, x.T @ x, kept)
    tried = list(_by_definition(weight, x, bits, group, symmetric, kept))
    error, stored, best = min(tried, key=lambda each: each[0])
    # ternary codes may gain nothing: their one scale is fitted to the active inputs as it is
    assert 0 < error < tried[0][0] or bits == 1.58
    assert torch.equal(found.input_scale, stored)
    assert torch.equal(found.codes, best.codes) and torch.equal(found.scale, best.scale)
    assert found.zero is None if symmetric else torch.equal(found.zero, best.zero)


@settings(deadline=None, max_examples=50)
@given(
    st.sampled_from(GRIDS), st.floats(0, 3), st.booleans(), st.integers(0, 99), st.integers(1, 40)
)
def test_awq_never_loses_more_than_rounding_to_nearest(grid, spread, half, seed, tokens):
    weight, x = _case(spread, 6, 64, seed)
    x = x[:tokens]
    kept = keep_largest(weight, Decimal(50)) if half else None
    says = torch.ones_like(weight) if kept is None else kept
    found = awq(weight, *grid, x.T @ x, kept)
    nearest = quantize(weight, *grid, kept, x.square().sum(0))
    values, plain = (
        _dequantized(each.codes, each.scale, each.zero, grid[0]) * says for each in (found, nearest)
    )
    lost = _error(weight, values * found.input_scale.double(), x)
    assert lost <= _error(weight, plain, x) * (1 + 1e-6)


@pytest.mark.parametrize(("bits", "group"), [(3, 32), (4, 64), (3, None)])
def test_awq_spares_the_outputs_of_inputs_that_stand_out(bits, group):
    weight, x = _case(spread=0.0)
    x[:, ::16] *= 30
    found = awq(weight, bits, group, False, x.T @ x)
    nearest = quantize(weight, bits, group, False, None, x.square().sum(0))
    errors = [_error(weight, each.values(bits).double(), x) for each in (found, nearest)]
    assert errors[0] < 0.95 * errors[1]
    assert found.input_scale[::16].max() < 0.9 * found.input_scale[1::16].min()


def test_awq_of_inputs_that_are_all_alike_is_rounding_to_nearest():
    weight, _ = _case()
    found = awq(weight, 3, 32, False, 7 * torch.eye(128).double())
    nearest = quantize(weight, 3, 32)
    assert torch.equal(found.input_scale, torch.ones(128).bfloat16())
    assert torch.equal(found.codes, nearest.codes) and torch.equal(found.scale, nearest.scale)


def test_awq_does_not_depend_on_the_unit_of_the_inputs():
    weight, x = _case()
    one, other = (awq(weight, 3, 32, False, x.T @ x * unit) for unit in (1, 2.0**-40))
    assert torch.equal(one.input_scale, other.input_scale) and torch.equal(one.codes, other.codes)


def test_awq_of_inputs_never_seen_scales_none():
    weight, _ = _case()
    found = awq(weight, 3, 32, False, torch.zeros(128, 128).double())
    assert torch.equal(found.input_scale, torch.ones(128).bfloat16())


def test_awq_keeps_the_weights_of_a_dead_input():
    weight, x = _case()
    x[:, 5] = 0
    values = awq(weight, 3, 32, False, x.T @ x).values(3)
    assert (values - weight)[:, 5].norm() < 0.5 * weight[:, 5].norm()


@pytest.mark.parametrize("text", ["w3g32", "w4", "w1.58g32", "s50%+w4g32s", "w3g32+o1%+r4"])
def test_realize_stores_two_bytes_an_input_more(text):
    weight, x = _case()
    seen, shape = InputStatistics(x.T @ x, len(x)), LayerShape(24, 128)
    step = text.partition("+o")[0]
    plain, scaled = (
        realize(weight, shape, parse_option(each), seen, "float32")
        for each in (text, text.replace(step, f"{step}:awq"))
    )
    sizes = [sum(t.nbytes for t in each.tensors.values()) for each in (plain, scaled)]
    assert sizes[1] == sizes[0] + 2 * 128
    assert scaled.format.input_scaled and not plain.format.input_scaled


@pytest.mark.parametrize("text", ["w3g32:awq", "w1.58:awq", "s50%+w4g32s:awq", "w8:awq"])
def test_realize_stores_what_the_scaled_codes_stand_for(text):
    weight, x = _case()
    option, shape = parse_option(text), LayerShape(24, 128)
    stored = realize(weight, shape, option, InputStatistics(x.T @ x, len(x)), "float32")
    kept = torch.ones(24, 128, dtype=torch.bool)
    if option.sparsity is not None:
        kept = unpack_mask(stored.tensors["mask"], shape.weights).view(24, 128)
    found = awq(weight, option.bits, option.group, option.symmetric, x.T @ x, kept)
    assert torch.equal(reference_weight(stored), found.values(option.bits).where(kept, 0))
