"""GPTQ against its papers' equations in float64, and against rounding to nearest."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from apportion.spaces.compressors.gptq import gptq, gptq_codes
from apportion.spaces.compressors.quantize import Quantized, quantize
from apportion.spaces.compressors.rescale import rescale


def _case(seed=0, out=12, inputs=64, tokens=256):
    """Weights, and correlated inputs whose mean squares differ by orders of magnitude."""
    random = torch.Generator().manual_seed(seed)
    mixing = torch.randn(inputs, inputs, generator=random, dtype=torch.float64)
    latent = torch.randn(tokens, inputs, generator=random, dtype=torch.float64)
    x = (latent * torch.arange(1, inputs + 1).double().rsqrt()) @ mixing
    x *= torch.exp(0.5 * torch.randn(inputs, generator=random, dtype=torch.float64))
    return torch.randn(out, inputs, generator=random) * 0.05, x.T @ x


def _values(quantized, bits):
    size = quantized.codes.shape[1] // quantized.scale.shape[1]
    scale = quantized.scale.double().repeat_interleave(size, 1)
    values = (quantized.codes.double() - 2 ** (bits - 1)) * scale
    if quantized.zero is not None:
        values += quantized.zero.double().repeat_interleave(size, 1)
    return values


def _output_error(weight, values, moment):
    lost = weight.double() - values
    return float(((lost @ moment) * lost).sum())


def _published(weight, bits, grid, moment, kept):
    """Codes, [H^-1]_jj when j is reached, rows without a tie: equations 1 to 3 of GPTQ.

    One input at a time, with the whole inverse updated after each; the greatest diagonal first. A
    code within 2e-4 of a tie is decided by rounding, and all that come after it in its row.
    """
    w = weight.double()
    inverse = torch.linalg.inv(
        moment + 0.01 * moment.diagonal().mean() * torch.eye(len(moment), dtype=torch.float64)
    )
    size = weight.shape[1] // grid.scale.shape[1]
    top = 2 ** (bits - 1)
    codes, diagonal = torch.zeros_like(weight, dtype=torch.uint8), torch.empty(len(moment))
    clear = torch.ones(len(weight), dtype=torch.bool)
    for j in sorted(range(len(moment)), key=lambda i: -float(moment[i, i])):
        scale = grid.scale[:, j // size].double()
        zero = 0 if grid.zero is None else grid.zero[:, j // size].double()
        low = -127 if bits == 8 and grid.zero is None else -top
        exact = ((w[:, j] - zero) / scale).clamp(low, top - 1)
        code = exact.round()
        clear &= ~kept[:, j] | ((exact - code).abs() < 0.5 - 2e-4)
        codes[:, j] = code + top
        stored = torch.where(kept[:, j], code * scale + zero, 0)
        w = w - torch.outer((w[:, j] - stored) / inverse[j, j], inverse[j])
        diagonal[j] = inverse[j, j]
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
        inverse[j, j] = 1
    return codes, diagonal, clear


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group, symmetric", [(None, False), (16, False), (None, True), (16, True)])
@pytest.mark.parametrize("sparse", [False, True])
def test_gptq_is_the_published_definition(bits, group, symmetric, sparse):
    weight, moment = _case(bits)
    kept = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) > 0.5 * sparse
    mask = kept if sparse else None
    for importance in (moment.diagonal(), (moment.diagonal() / _diagonal(moment)).sqrt()):
        grid = quantize(weight, bits, group, symmetric, mask, importance)
        codes, _, clear = _published(weight, bits, grid, moment, kept)
        found = gptq_codes(weight, bits, grid, moment, mask)
        same = (found == codes) | ~kept
        assert same[clear].all() and clear.sum() >= 8
    # The second grid is gptq's own: ranges by what is lost for good; least squares come last.
    fitted = rescale(weight, replace(grid, codes=found), bits, moment, mask)
    whole = gptq(weight, bits, group, symmetric, moment, mask)
    assert ((whole.codes == found) | ~kept)[clear].all()
    torch.testing.assert_close(whole.scale[clear], fitted.scale[clear])
    assert (whole.zero is None) == symmetric
    if not symmetric:
        torch.testing.assert_close(whole.zero[clear], fitted.zero[clear])


def _diagonal(moment):
    """[H^-1]_jj when j is reached, [in]; it depends on no weight."""
    weight = torch.zeros(1, len(moment))
    grid = Quantized(weight, torch.ones(1, 1), None)
    return _published(weight, 4, grid, moment, weight == 0)[1]


def test_gptq_over_several_blocks_is_the_published_definition():
    weight, moment = _case(0, out=8, inputs=320, tokens=400)
    grid = quantize(weight, 3, 40, importance=moment.diagonal())
    every = torch.ones_like(weight, dtype=torch.bool)
    codes, _, clear = _published(weight, 3, grid, moment, every)
    assert torch.equal(gptq_codes(weight, 3, grid, moment)[clear], codes[clear])
    assert clear.sum() >= 4


@pytest.mark.parametrize(
    "bits, group, share", [(2, 16, 0.6), (3, 16, 0.55), (4, 16, 0.55), (4, None, 0.5)]
)
def test_gptq_has_less_output_error_than_rounding_to_nearest(bits, group, share):
    ratios = []
    for seed in range(20):
        weight, moment = _case(seed)
        nearest = quantize(weight, bits, group, False, None, moment.diagonal())
        ratios.append(
            _output_error(weight, _values(gptq(weight, bits, group, False, moment), bits), moment)
            / _output_error(weight, _values(nearest, bits), moment)
        )
    assert sum(ratios) / 20 < share
    assert max(ratios) < 1


@pytest.mark.parametrize("symmetric", [False, True])
def test_gptq_of_uncorrelated_inputs_is_rounding_to_nearest(symmetric):
    weight, _ = _case()
    nearest = quantize(weight, 3, 16, symmetric)
    codes = gptq_codes(weight, 3, nearest, torch.eye(64, dtype=torch.float64))
    assert torch.equal(codes, nearest.codes)


def test_gptq_is_stored_as_rounding_to_nearest_is():
    weight, moment = _case()
    found, nearest = gptq(weight, 3, 16, False, moment), quantize(weight, 3, 16)
    for name in ("codes", "scale", "zero"):
        one, other = getattr(found, name), getattr(nearest, name)
        assert one.dtype == other.dtype and one.shape == other.shape and one.is_contiguous()
    assert found.codes.max() <= 7


def test_gptq_symmetric_8_bit_does_not_use_the_lowest_code():
    weight, moment = _case()
    assert gptq(weight * 0.01, 8, None, True, moment).codes.min() >= 1


def test_gptq_lets_the_kept_weights_make_up_for_the_others():
    weight, moment = _case()
    kept = torch.rand(weight.shape, generator=torch.Generator().manual_seed(2)) > 0.5
    made_up = _values(gptq(weight, 4, 16, False, moment, kept), 4) * kept
    nearest = _values(quantize(weight, 4, 16, False, kept, moment.diagonal()), 4) * kept
    error = _output_error(weight, made_up, moment)
    assert error < 0.65 * _output_error(weight, nearest, moment)
    assert error < _output_error(weight, weight.double() * kept, moment)


def test_gptq_rounds_dead_inputs_to_nearest_and_leaves_the_others_alone():
    weight, moment = _case()
    moment[5], moment[:, 5] = 0, 0
    grid = quantize(weight, 4, 16, importance=moment.diagonal())
    codes = gptq_codes(weight, 4, grid, moment)
    assert torch.equal(codes[:, 5], grid.codes[:, 5])
    other = weight.index_fill(1, torch.tensor([5]), 0)
    others = [i for i in range(64) if i != 5]
    assert torch.equal(gptq_codes(other, 4, grid, moment)[:, others], codes[:, others])


@pytest.mark.parametrize("kind", ["zero", "one token", "constant", "repeated", "one live input"])
@pytest.mark.parametrize("bits, group, symmetric", [(2, 16, False), (8, None, True)])
def test_gptq_of_a_singular_moment_is_about_as_good_as_rounding_to_nearest_at_least(
    kind, bits, group, symmetric
):
    weight, _ = _case()
    x = torch.randn(40, 64, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    x = {
        "zero": x * 0,
        "one token": x[:1],
        "constant": torch.full_like(x, 3.0),
        "repeated": x[:, :32].repeat(1, 2),
        "one live input": x * (torch.arange(64) == 7),
    }[kind]
    moment = x.T @ x
    values = _values(gptq(weight, bits, group, symmetric, moment), bits)
    nearest = _values(quantize(weight, bits, group, symmetric, None, moment.diagonal()), bits)
    assert values.isfinite().all()
    live = moment.diagonal()[moment.diagonal() > 0]
    moment.diagonal().add_(0.01 * live.sum() / max(len(live), 1))
    assert _output_error(weight, values, moment) <= 1.1 * _output_error(weight, nearest, moment)


@given(st.integers(0, 99), st.sampled_from([0.0, 1e-30, 1e4]))
def test_gptq_of_a_constant_weight_is_exact_to_two_bfloat16(seed, value):
    _, moment = _case(seed, inputs=32)
    values = _values(gptq(torch.full((2, 32), value), 3, 16, False, moment), 3)
    assert (values - value).abs().max() <= abs(value) * 2**-7


def test_gptq_is_deterministic_and_leaves_its_arguments_alone():
    weight, moment = _case()
    weight_before, moment_before = weight.clone(), moment.clone()
    first = gptq(weight, 3, 16, False, moment)
    second = gptq(weight.clone(), 3, 16, False, moment.clone())
    assert torch.equal(first.codes, second.codes) and torch.equal(first.scale, second.scale)
    assert torch.equal(weight, weight_before) and torch.equal(moment, moment_before)
