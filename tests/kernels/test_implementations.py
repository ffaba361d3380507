"""Every implementation against the reference definition, on each kind of format it serves."""

import copy
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from apportion.errors import InvalidInput
from apportion.kernels.formats import ConvGeometry, Format, LayerShape, StoredWeight
from apportion.kernels.group import resident_bytes
from apportion.kernels.integer_linear import unsigned_codes, unsigned_tokens
from apportion.kernels.reference import (
    ReferenceLayer,
    quantize_by,
    quantize_tokens,
    reference_layer,
    reference_weight,
)
from apportion.kernels.registry import IMPLEMENTATIONS

W8A8 = Format("float32", 8, symmetric=True, activation_bits=8)
W8A8S = replace(W8A8, static_activations=True)
FORMATS = {
    "f32": Format("float32"),
    "bf16": Format("bfloat16"),
    "fp16": Format("float16"),
    "w4g32": Format("float32", 4, 32),
    "w4g64 of bf16": Format("bfloat16", 4, 64),
    "w4g64s": Format("float32", 4, 64, symmetric=True),
    "w3": Format("float32", 3),
    "w1.58g32": Format("float32", 1.58, 32, symmetric=True),
    "w6g32": Format("float32", 6, 32),
    "w8": Format("float32", 8, symmetric=True),
    "w8a8": W8A8,
    "w8a8 of bf16": Format("bfloat16", 8, symmetric=True, activation_bits=8),
    "w8a8s": W8A8S,
    "w8a8s of bf16": replace(W8A8S, dtype="bfloat16"),
    "s60%": Format("float32", sparse=True),
    "s60%+w1.58": Format("float32", 1.58, symmetric=True, sparse=True),
    "s60%+w2g32": Format("float32", 2, 32, sparse=True),
    "w4g32+r4": Format("float32", 4, 32, residual_rank=4),
    "w3g32+o": Format("float32", 3, 32, outliers=40),
    "s60%+w4g32+o+r4": Format("float32", 4, 32, sparse=True, outliers=9, residual_rank=4),
    "w4g32:awq": Format("float32", 4, 32, input_scaled=True),
    "w4g64:awq of bf16": Format("bfloat16", 4, 64, input_scaled=True),
    "w8:awq": Format("float32", 8, symmetric=True, input_scaled=True),
    "s60%+w3:awq+o+r4": Format(
        "float32", 3, sparse=True, outliers=9, residual_rank=4, input_scaled=True
    ),
    "r": Format("float32", rank=24),
    "r of bf16": Format("bfloat16", rank=24),
    "r of fp16": Format("float16", rank=24),
}
LINEAR = (LayerShape(48, 128), LayerShape(16, 128), LayerShape(32, 128))
WIDE = ConvGeometry((3, 3), (2, 1), (1, 1), (1, 1))
POINT = ConvGeometry((1, 1), (1, 1), (0, 0), (1, 1))
GROUPED = ConvGeometry((3, 3), (1, 1), (1, 1), (1, 2), groups=2)
CONVS = (
    (LayerShape(10, 288, WIDE), LayerShape(6, 32, POINT)),
    (LayerShape(6, 288, GROUPED),),
)
TUCKER = {
    "tucker": Format("float32", rank=8, input_rank=12),
    "tucker of bf16": Format("bfloat16", rank=8, input_rank=12),
    "tucker of fp16": Format("float16", rank=8, input_rank=12),
}
DILATED = ConvGeometry((3, 2), (1, 2), (2, 0), (2, 1))
TUCKER_CONVS = (LayerShape(10, 288, WIDE), LayerShape(6, 192, DILATED))
CASES = [
    pytest.param(name, format, shapes, id=f"{name}-{label}-{len(shapes)}x{shapes[0].in_features}")
    for shapes in (LINEAR, LINEAR[:1], *CONVS)
    for label, format in FORMATS.items()
    for name, each in IMPLEMENTATIONS.items()
    if each.refuses(format, shapes, "cpu") is None
] + [
    pytest.param(f"conv.{short}", format, TUCKER_CONVS, id=f"conv.{short}-{label}")
    for short, (label, format) in zip(("f32", "bf16", "fp16"), TUCKER.items(), strict=True)
]


def tolerance(name: str, dtype: torch.dtype) -> float:
    """Of the output's norm; outputs in 16 bits are rounded to them."""
    return 1e-2 if name.endswith(("bf16", "fp16")) or dtype != torch.float32 else 1e-6


def example(shapes: tuple[LayerShape, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    if shapes[0].conv is None:
        return torch.randn(2, 5, shapes[0].in_features).to(dtype)
    channels = shapes[0].in_features * shapes[0].conv.groups
    height, width = shapes[0].conv.kernel
    return torch.randn(2, channels // (height * width), 6, 7).to(dtype)


def group(
    name: str, format: Format, shapes: tuple[LayerShape, ...], store: Any
) -> tuple[nn.Module, list[ReferenceLayer]]:
    """The built operator, its first member with a bias, the next without, and its reference."""
    weights = [store(format, shape, seed) for seed, shape in enumerate(shapes)]
    biases = [torch.randn(s.out_features) if i % 2 == 0 else None for i, s in enumerate(shapes)]
    pairs = zip(weights, biases, strict=True)
    references = [reference_layer(weight, bias) for weight, bias in pairs]
    return IMPLEMENTATIONS[name].build(weights, biases), references


def assert_close(found: Tensor, expected: Tensor, bound: float) -> None:
    assert found.dtype == expected.dtype and found.shape == expected.shape
    error = (found.double() - expected.double()).norm() / expected.double().norm()
    assert error <= bound


@pytest.mark.parametrize(("name", "format", "shapes"), CASES)
def test_outputs_are_those_of_the_reference(
    name: str, format: Format, shapes: tuple[LayerShape, ...], store: Any
) -> None:
    operator, references = group(name, format, shapes, store)
    for dtype in (torch.float32, torch.bfloat16):
        x = example(shapes, dtype)
        for found, reference in zip(operator(x), references, strict=True):
            assert_close(found, reference(x), tolerance(name, dtype))


@pytest.mark.parametrize(("name", "format", "shapes"), CASES)
def test_a_token_never_sees_another(
    name: str, format: Format, shapes: tuple[LayerShape, ...], store: Any
) -> None:
    operator, references = group(name, format, shapes, store)
    x = example(shapes)
    other = x.clone()
    kept = (0,) if shapes[0].conv else (0, slice(0, 3))
    other[1] = 50 * torch.randn_like(x[1])
    if shapes[0].conv is None:
        other[0, 3:] *= 1000
    layers = [operator, *(lambda x, r=r: (r(x),) for r in references)]
    for layer in layers:
        for before, after in zip(layer(x), layer(other), strict=True):
            assert torch.equal(before[kept], after[kept])
            assert not torch.equal(before, after)


@pytest.mark.parametrize(("name", "format", "shapes"), CASES)
def test_copies_run_without_the_original(
    name: str, format: Format, shapes: tuple[LayerShape, ...], store: Any
) -> None:
    operator, _ = group(name, format, shapes, store)
    x = example(shapes)
    copied = copy.deepcopy(operator)
    expected = [part.clone() for part in operator(x)]
    assert resident_bytes(copied) == resident_bytes(operator) > 0
    del operator
    for found, wanted in zip(copied(x), expected, strict=True):
        assert torch.equal(found, wanted)


LINEAR_CASES = [case for case in CASES if case.values[2] is LINEAR]


@pytest.mark.parametrize(("name", "format", "shapes"), LINEAR_CASES)
def test_any_layout_of_the_input_gives_the_same(
    name: str, format: Format, shapes: tuple[LayerShape, ...], store: Any
) -> None:
    operator, references = group(name, format, shapes, store)
    rows = torch.randn(128, 6)
    inputs = (rows[:, 0], rows.t()[:1], rows.t(), rows.t().reshape(3, 2, 128).transpose(0, 1))
    for x in inputs:
        for found, reference in zip(operator(x), references, strict=True):
            assert_close(found, reference(x), tolerance(name, torch.float32))


@pytest.mark.parametrize(("name", "format", "shapes"), LINEAR_CASES)
def test_input_stays_as_it_was(
    name: str, format: Format, shapes: tuple[LayerShape, ...], store: Any
) -> None:
    operator, _ = group(name, format, shapes, store)
    x = torch.randn(3, 128)
    before = x.clone()
    first = [part.clone() for part in operator(x)]
    assert torch.equal(x, before)
    assert all(map(torch.equal, first, operator(x)))


@pytest.mark.parametrize("inputs", [32, 1000])
def test_integer_sums_are_exact(inputs: int, store: Any) -> None:
    shape = LayerShape(16, inputs)
    stored = store(W8A8, shape)
    stored.tensors["scale"].fill_(1)
    codes = reference_weight(stored)
    x = torch.randint(-127, 128, (7, inputs)).float()
    x[:, 0] = 127
    (y,) = IMPLEMENTATIONS["int8.onednn"].build([stored], [None])(x)
    assert torch.equal(y.long(), x.long() @ codes.long().t())


def test_worst_integer_sums_do_not_saturate(store: Any) -> None:
    stored = StoredWeight(
        W8A8,
        LayerShape(16, 512),
        {
            "codes": torch.full((16 * 512,), 255, dtype=torch.uint8),
            "scale": torch.ones(16, 1, dtype=torch.bfloat16),
        },
    )
    (y,) = IMPLEMENTATIONS["int8.onednn"].build([stored], [None])(torch.full((3, 512), 127.0))
    assert torch.equal(y, torch.full((3, 16), 127.0 * 127 * 512))


def test_activations_are_rounded_as_in_the_reference() -> None:
    x = torch.randn(500, 64) * torch.logspace(-20, 20, 500)[:, None]
    x[:, :8] = x.abs().amax(-1, keepdim=True) * torch.arange(8) / 254  # halves: ties
    codes, scale = unsigned_tokens(x)
    expected, expected_scale = quantize_tokens(x)
    assert torch.equal(codes.float() - 128, expected) and torch.equal(scale, expected_scale)


@pytest.mark.parametrize("scale", [1e-38, 0.013, 0.25, 3e30])
def test_activations_are_rounded_by_a_fixed_scale_as_in_the_reference(scale: float) -> None:
    spread = torch.logspace(-3, 6, 500)[:, None] * torch.tensor(scale)
    x = torch.cat([torch.randn(500, 64) * spread, torch.arange(-255, 257).view(8, 64) * scale / 2])
    edges = torch.tensor([0.0, -0.0, 3.4e38, -3.4e38]).repeat(1, 16)  # halves above: ties
    x = torch.cat([x, edges]).clamp(-3.4e38, 3.4e38)
    expected = quantize_by(x, torch.tensor([scale]))
    assert torch.equal(unsigned_codes(x, scale_of(scale)).float() - 128, expected)
    assert (expected.min(), expected.max()) == (-127, 127)


def scale_of(scale: float) -> float:
    """As a float32 holds it."""
    return float(torch.tensor(scale))


def test_zero_instead_of_a_fixed_scale_gives_each_token_its_own(store: Any) -> None:
    static = store(W8A8S, LINEAR[0])
    static.tensors["activation_scale"].zero_()
    plain = {name: t for name, t in static.tensors.items() if name != "activation_scale"}
    dynamic = StoredWeight(W8A8, LINEAR[0], plain)
    x = torch.randn(5, 128) * torch.logspace(-3, 3, 5)[:, None]
    for name in ("int8.onednn", "int8.reference"):
        build = IMPLEMENTATIONS[name].operator
        assert torch.equal(build([static], [None])(x)[0], build([dynamic], [None])(x)[0])


def test_group_of_different_fixed_scales_is_refused(store: Any) -> None:
    weights = [store(W8A8S, shape) for shape in LINEAR[:2]]
    weights[1].tensors["activation_scale"].mul_(2)
    with pytest.raises(InvalidInput, match="have one scale of their input"):
        IMPLEMENTATIONS["int8.onednn"].build(weights, [None, None])


@pytest.mark.parametrize("name", ["int8.onednn"])
def test_silent_tokens_give_the_bias(name: str, store: Any) -> None:
    bias = torch.randn(48)
    operator = IMPLEMENTATIONS[name].build([store(W8A8, LINEAR[0])], [bias])
    x = torch.randn(4, 128)
    x[2] = 0
    assert torch.equal(operator(x)[0][2], bias)


@pytest.mark.parametrize("name", ["int8.onednn", "int8.reference"])
@pytest.mark.parametrize("format", [W8A8, W8A8S])
def test_activations_that_are_not_finite_are_not_hidden(
    name: str, format: Format, store: Any
) -> None:
    operator = IMPLEMENTATIONS[name].operator([store(format, LINEAR[0])], [None])
    for spoiled in (float("nan"), float("inf"), float("-inf")):
        x = torch.randn(2, 128)
        x[0, 5] = spoiled
        y = operator(x)[0]
        assert not y[0].isfinite().any() and y[1].isfinite().all()


def test_sums_of_finite_activations_that_overflow_hide_nothing_and_spoil_nothing(
    store: Any,
) -> None:
    stored = store(W8A8S, LINEAR[0])
    (y,) = IMPLEMENTATIONS["int8.onednn"].build([stored], [None])(torch.full((2, 128), 3e38))
    assert_close(y, reference_layer(stored, None)(torch.full((2, 128), 3e38)), 1e-6)
    assert y.isfinite().all()


@pytest.mark.parametrize("label", ["w4g32", "w8", "w4g32:awq", "w8:awq"])
def test_integers_stay_packed(label: str, store: Any) -> None:
    name = "int4pack.bf16" if label.startswith("w4") else "int8pack.bf16"
    operator, _ = group(name, FORMATS[label], LINEAR, store)
    dense, _ = group("linear.bf16", FORMATS[label], LINEAR, store)
    assert resident_bytes(operator) < resident_bytes(dense)


def test_tucker_form_stays_three_convolutions(store: Any) -> None:
    sizes = [
        resident_bytes(group("conv.f32", format, TUCKER_CONVS, store)[0])
        for format in (Format("float32"), TUCKER["tucker"])
    ]
    factors = sum(8 * out + 12 * 32 + 8 * 12 * area for out, area in ((10, 9), (6, 6)))
    assert sizes == [4 * (10 * 288 + 6 * 192 + 10), 4 * (factors + 10)]


def test_fewer_bytes_are_held_the_lower_the_rank(store: Any) -> None:
    sizes = [
        resident_bytes(group("low_rank.f32", Format("float32", rank=rank), LINEAR, store)[0])
        for rank in (8, 16, 24)
    ]
    assert all(small < large for small, large in pairwise(sizes))
