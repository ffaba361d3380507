import subprocess
import sys
from typing import Any

import pytest
import torch

from apportion.errors import ApportionError, InvalidInput
from apportion.kernels.formats import ConvGeometry, Format, LayerShape
from apportion.kernels.registry import IMPLEMENTATIONS, implementation, refusals, serving

W4 = Format("float32", 4, 64)
W8 = Format("float32", 8, symmetric=True)
W8A8 = Format("float32", 8, symmetric=True, activation_bits=8)
W8A8S = Format("float32", 8, symmetric=True, activation_bits=8, static_activations=True)
SCALED_W4 = Format("float32", 4, 64, input_scaled=True)
SCALED_W8 = Format("float32", 8, symmetric=True, input_scaled=True)
LAYER = LayerShape(32, 128)
CONV = LayerShape(32, 18, ConvGeometry((3, 3), (1, 1), (1, 1), (1, 1)))


def names(format: Format, shape: LayerShape = LAYER) -> list[str]:
    return [each.name for each in serving(format, [shape], "cpu")]


@pytest.mark.parametrize(
    ("format", "expected"),
    [
        (Format("float32"), ["linear.f32"]),
        (Format("bfloat16"), ["linear.bf16"]),
        (Format("float16"), ["linear.fp16"]),
        (W4, ["linear.f32", "linear.bf16", "int4pack.bf16"]),
        (Format("bfloat16", 4, 64), ["linear.bf16", "int4pack.bf16"]),
        (SCALED_W4, ["linear.f32", "linear.bf16", "int4pack.bf16"]),
        (Format("float32", 4), ["linear.f32", "linear.bf16"]),
        (Format("float32", 4, 64, symmetric=True), ["linear.f32", "linear.bf16"]),
        (Format("float32", 4, 64, sparse=True), ["linear.f32", "linear.bf16"]),
        (Format("float32", 4, 64, residual_rank=8), ["linear.f32", "linear.bf16"]),
        (Format("float32", 4, 64, outliers=8), ["linear.f32", "linear.bf16"]),
        (Format("float32", 5, 64), ["linear.f32", "linear.bf16"]),
        (Format("float32", 6), ["linear.f32", "linear.bf16"]),
        (Format("float32", 1.58, 64, symmetric=True), ["linear.f32", "linear.bf16"]),
        (Format("bfloat16", 1.58, symmetric=True), ["linear.bf16"]),
        (W8, ["linear.f32", "linear.bf16", "int8pack.bf16"]),
        (Format("float32", 8, 64, symmetric=True), ["linear.f32", "linear.bf16"]),
        (SCALED_W8, ["linear.f32", "linear.bf16", "int8pack.bf16"]),
        (W8A8, ["int8.onednn"]),
        (W8A8S, ["int8.onednn"]),
        (Format("float32", sparse=True), ["linear.f32"]),
        (Format("float32", rank=8), ["linear.f32", "low_rank.f32"]),
        (Format("bfloat16", rank=8), ["linear.bf16", "low_rank.bf16"]),
    ],
)
def test_linear_layers_are_served_by(format: Format, expected: list[str]) -> None:
    assert names(format) == expected


@pytest.mark.parametrize("inputs", [8, 24, 120])
def test_8_bit_operator_leaves_alone_what_it_crashes_on(inputs: int) -> None:
    assert names(W8, LayerShape(32, inputs)) == ["linear.f32", "linear.bf16"]
    reason = refusals(W8, [LayerShape(32, inputs)], "cpu")["int8pack.bf16"]
    assert reason == "needs inputs in multiples of 16"


@pytest.mark.parametrize(
    ("format", "expected"),
    [
        (Format("float32"), ["conv.f32"]),
        (Format("float32", 4, 9), ["conv.f32", "conv.bf16"]),
        (Format("float32", 3, 9, outliers=8), ["conv.f32", "conv.bf16"]),
        (Format("float32", rank=4, input_rank=2), ["conv.f32"]),
        (Format("bfloat16", rank=4), ["conv.bf16"]),
        (W8A8, ["int8.reference"]),
        (W8A8S, ["int8.reference"]),
    ],
)
def test_convolutions_are_served_by(format: Format, expected: list[str]) -> None:
    assert names(format, CONV) == expected


@pytest.mark.parametrize("format", [Format("float32"), W4, W8, W8A8, Format("float32", rank=4)])
@pytest.mark.parametrize("shape", [LAYER, CONV, LayerShape(7, 5)])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_who_does_not_serve_says_why(format: Format, shape: LayerShape, device: str) -> None:
    reasons = refusals(format, [shape], device)
    served = {each.name for each in serving(format, [shape], device)}
    assert served | set(reasons) == set(IMPLEMENTATIONS) and not served & set(reasons)
    assert all(len(reason.split()) > 2 for reason in reasons.values())


def test_int4_needs_its_rows_in_the_whole_group() -> None:
    small = LayerShape(8, 128)
    assert "int4pack.bf16" in refusals(W4, [small], "cpu")
    assert "int4pack.bf16" not in refusals(W4, [small, small], "cpu")


def test_int4_needs_its_rows_in_each_member_that_scales_its_inputs() -> None:
    small, large = LayerShape(8, 128), LayerShape(16, 128)
    assert "16 outputs, not 8" in refusals(SCALED_W4, [large, small, small], "cpu")["int4pack.bf16"]
    assert "int4pack.bf16" not in refusals(SCALED_W4, [large, large], "cpu")


def test_int8_sums_need_their_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    assert "VNNI" in refusals(W8A8, [LAYER], "cpu")["int8.onednn"]


def test_unknown_name_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(InvalidInput, match="'linear.f64'; known: linear.f32, .*int8.onednn"):
        implementation("linear.f64")


def test_known_name_is_found() -> None:
    assert implementation("int4pack.bf16").name == "int4pack.bf16"


@pytest.mark.parametrize(
    ("name", "format", "shape"),
    [
        ("linear.f32", Format("bfloat16"), LAYER),
        ("linear.f32", W8A8, LAYER),
        ("conv.f32", Format("float32"), LAYER),
        ("linear.f32", Format("float32"), CONV),
        ("int4pack.bf16", W4, LayerShape(8, 64)),
    ],
)
def test_what_is_refused_is_not_built(
    name: str, format: Format, shape: LayerShape, store: Any
) -> None:
    with pytest.raises(InvalidInput, match=name):
        implementation(name).build([store(format, shape)], [None])


def test_layers_of_different_inputs_are_no_group(store: Any) -> None:
    weights = [store(Format("float32"), LayerShape(4, inputs)) for inputs in (8, 9)]
    with pytest.raises(InvalidInput, match="share one input"):
        implementation("linear.f32").build(weights, [None, None])


def test_layers_of_different_formats_are_no_group(store: Any) -> None:
    weights = [store(format, LAYER) for format in (Format("float32"), W4)]
    with pytest.raises(InvalidInput, match="one format"):
        implementation("linear.f32").build(weights, [None, None])


def test_members_may_differ_in_rank(store: Any) -> None:
    weights = [store(Format("float32", rank=rank), LAYER) for rank in (4, 8)]
    operator = implementation("low_rank.f32").build(weights, [None, None])
    assert [part.shape for part in operator(torch.randn(3, 128))] == [(3, 32), (3, 32)]


def test_members_may_differ_in_how_many_outliers_they_have(store: Any) -> None:
    weights = [store(Format("float32", 4, 64, outliers=count), LAYER) for count in (4, 8)]
    operator = implementation("linear.f32").build(weights, [None, None])
    assert [part.shape for part in operator(torch.randn(3, 128))] == [(3, 32), (3, 32)]


@pytest.mark.parametrize("biases", [[], [None, None]])
def test_weights_without_their_biases_are_no_group(biases: list[None], store: Any) -> None:
    with pytest.raises(ApportionError, match="1 weights"):
        implementation("linear.f32").build([store(Format("float32"), LAYER)], biases)


def test_import_brings_nothing_heavy_but_torch() -> None:
    code = (
        "import sys, apportion.kernels.registry, apportion.kernels.group;"
        "heavy = {'triton', 'ray', 'sqlalchemy', 'optuna', 'transformers', 'pydantic', 'scipy'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
