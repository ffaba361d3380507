import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apportion.errors import ApportionError
from apportion.kernels.formats import ConvGeometry, Format, LayerShape, StoredWeight
from apportion.kernels.packing import pack_codes, pack_mask
from apportion.kernels.positions import pack_positions
from apportion.kernels.reference import (
    ReferenceLayer,
    activation_scale,
    integer_rows,
    quantize_by,
    quantize_tokens,
    reference_layer,
    reference_weight,
)

W8A8 = Format("float32", 8, symmetric=True, activation_bits=8)
W8A8S = Format("float32", 8, symmetric=True, activation_bits=8, static_activations=True)


def tensor(values: Any, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


def test_codes_stand_for_scale_times_distance_plus_zero() -> None:
    codes = pack_codes(tensor([0, 1, 2, 3, 3, 2, 1, 0], torch.uint8), 2)
    scale, zero = tensor([[1.0, 2.0], [0.5, 4.0]]), tensor([[0.0, 10.0], [1.0, 0.0]])
    stored = StoredWeight(
        Format("float32", 2, group=2),
        LayerShape(2, 4),
        {"codes": codes, "scale": scale, "zero": zero},
    )
    expected = [[-2.0, -1.0, 10.0, 12.0], [1.5, 1.0, -4.0, -8.0]]
    assert reference_weight(stored).tolist() == expected


def test_sparse_codes_stand_where_the_mask_is_set() -> None:
    mask = pack_mask(tensor([[0, 1, 1], [1, 0, 0]], torch.bool).flatten())
    codes = pack_codes(tensor([0, 15, 8], torch.uint8), 4)
    scale, zero = tensor([[1.0], [2.0]]), tensor([[0.5], [3.0]])
    tensors = {"mask": mask, "codes": codes, "scale": scale, "zero": zero}
    stored = StoredWeight(Format("float32", 4, sparse=True), LayerShape(2, 3), tensors)
    assert reference_weight(stored).tolist() == [[0.0, -7.5, 7.5], [3.0, 0.0, 0.0]]


def test_ternary_codes_stand_for_minus_one_none_and_one_scale() -> None:
    codes = pack_codes(tensor([0, 1, 2, 2, 1, 0, 0, 2], torch.uint8), 1.58)
    scale = tensor([[1.0, 2.0], [0.5, 4.0]])
    format = Format("float32", 1.58, group=2, symmetric=True)
    stored = StoredWeight(format, LayerShape(2, 4), {"codes": codes, "scale": scale})
    expected = [[-1.0, 0.0, 2.0, 2.0], [0.0, -0.5, -4.0, 4.0]]
    assert reference_weight(stored).tolist() == expected


def test_sparse_values_stand_row_by_row() -> None:
    tensors = {
        "mask": pack_mask(tensor([0, 1, 1, 0], torch.bool)),
        "values": tensor([5.0, 6.0], torch.float32),
    }
    stored = StoredWeight(Format("float32", sparse=True), LayerShape(2, 2), tensors)
    assert reference_weight(stored).tolist() == [[0.0, 5.0], [6.0, 0.0]]


def test_outliers_stand_in_place_of_their_codes_and_before_the_residual() -> None:
    tensors = {
        "codes": pack_codes(tensor([0, 1, 2, 3, 3, 2, 1, 0], torch.uint8), 2),
        "scale": tensor([[1.0], [0.5]]),
        "zero": tensor([[0.0], [1.0]]),
        "outlier_values": tensor([7.0, -9.0]),
        "residual_left": tensor([[0.0], [1.0]]),
        "residual_right": tensor([[1.0, 0.0, 0.0, 0.0]]),
    }
    places, counts = pack_positions(tensor([1, 4], torch.int64), 8)
    tensors |= {"outlier_places": places, "outlier_counts": counts}
    format = Format("float32", 2, residual_rank=1, outliers=2)
    stored = StoredWeight(format, LayerShape(2, 4), tensors)
    assert reference_weight(stored).tolist() == [[-2.0, 7.0, 0.0, 1.0], [-8.0, 1.0, 0.5, 0.0]]


def test_codes_are_multiplied_by_the_scale_of_their_input_and_nothing_else_is() -> None:
    tensors = {
        "codes": pack_codes(tensor([0, 1, 2, 3, 3, 2, 1, 0], torch.uint8), 2),
        "scale": tensor([[1.0], [0.5]]),
        "zero": tensor([[0.0], [1.0]]),
        "input_scale": tensor([2.0, 3.0, 4.0, -1.0]),
        "outlier_values": tensor([7.0]),
        "residual_left": tensor([[0.0], [1.0]]),
        "residual_right": tensor([[1.0, 0.0, 0.0, 0.0]]),
    }
    places, counts = pack_positions(tensor([1], torch.int64), 8)
    tensors |= {"outlier_places": places, "outlier_counts": counts}
    format = Format("float32", 2, residual_rank=1, outliers=1, input_scaled=True)
    stored = StoredWeight(format, LayerShape(2, 4), tensors)
    assert reference_weight(stored).tolist() == [[-4.0, 7.0, 0.0, -1.0], [4.0, 3.0, 2.0, 0.0]]


def test_scaled_inputs_are_multiplied_before_they_meet_the_codes(store: Any) -> None:
    stored = store(Format("float32", 4, 16, input_scaled=True), LayerShape(8, 64))
    plain = dict(stored.tensors)
    rate = plain.pop("input_scale").double()
    codes = reference_weight(StoredWeight(Format("float32", 4, 16), stored.shape, plain)).double()
    x = torch.randn(5, 64).double()
    torch.testing.assert_close(x @ reference_weight(stored).T.double(), (x * rate) @ codes.T)


def test_residual_is_added() -> None:
    tensors = {
        "weight": torch.ones(2, 2),
        "residual_left": tensor([[1.0], [2.0]]),
        "residual_right": tensor([[3.0, 4.0]]),
    }
    stored = StoredWeight(Format("float32", residual_rank=1), LayerShape(2, 2), tensors)
    assert reference_weight(stored).tolist() == [[4.0, 5.0], [7.0, 9.0]]


def test_pair_is_its_product(store: Any) -> None:
    stored = store(Format("float32", rank=3), LayerShape(5, 7))
    exact = stored.tensors["left"].double() @ stored.tensors["right"].double()
    assert torch.allclose(reference_weight(stored).double(), exact, atol=1e-7)


def test_tucker_form_is_its_core_between_its_factors(store: Any) -> None:
    geometry = ConvGeometry((2, 3), (1, 1), (0, 0), (1, 1))
    stored = store(Format("float32", rank=3, input_rank=2), LayerShape(4, 30, geometry))
    left, core, right = (stored.tensors[name].double() for name in ("left", "core", "right"))
    weight = reference_weight(stored).view(4, 5, 6)
    for out, channel, position in ((0, 0, 0), (3, 4, 5), (1, 3, 2), (2, 0, 4)):
        terms = (
            left[out, r] * core[r, i * 6 + position] * right[i, channel]
            for r in range(3)
            for i in range(2)
        )
        assert float(weight[out, channel, position]) == pytest.approx(float(sum(terms)), abs=1e-8)


@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=9))
def test_tokens_are_quantized_to_the_nearest(row: list[float]) -> None:
    codes, scale = quantize_tokens(torch.tensor([row]))
    assert codes.abs().max() <= 127 and torch.equal(codes, codes.round())
    largest = max(map(abs, row))
    assert torch.all((codes * scale - torch.tensor([row])).abs() <= 0.50001 * scale)
    assert largest < 1e-30 or math.isclose(float(scale), largest / 127, rel_tol=1e-6)


@given(
    st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=9),
    st.floats(0.0078125, 100, width=32),
)
def test_fixed_scale_rounds_to_the_nearest_and_saturates(row: list[float], scale: float) -> None:
    codes = quantize_by(torch.tensor([row]), torch.tensor([scale]))
    assert torch.equal(codes, codes.round())
    lost = codes.double() * scale - torch.tensor([row]).double()
    beyond = torch.tensor([row]).double().abs() - 127 * scale
    assert torch.all(lost.abs() <= torch.maximum(beyond, torch.tensor(0.5001 * scale)) * 1.0001)


@pytest.mark.parametrize("conv", [None, ConvGeometry((3, 3), (2, 1), (1, 1), (1, 1))])
def test_layer_of_a_fixed_scale_equals_a_float64_reference(
    conv: ConvGeometry | None, store: Any
) -> None:
    shape = LayerShape(6, 36, conv)
    stored, bias = store(W8A8S, shape), torch.randn(6)
    stored.tensors["activation_scale"].fill_(0.0123)
    x = torch.randn(5, 36) if conv is None else torch.randn(2, 4, 7, 6)
    scale = stored.tensors["activation_scale"].double()
    rounded = (x.double() / scale).round().clamp(-127, 127) * scale
    assert (x.abs() > 127 * scale).any()
    weight = reference_weight(stored).double()
    if conv is None:
        exact = rounded @ weight.T + bias.double()
    else:
        kernel, step = weight.view(6, 4, 3, 3), dict(stride=(2, 1), padding=(1, 1))
        exact = torch.nn.functional.conv2d(rounded, kernel, bias.double(), **step)
    found = reference_layer(stored, bias)(x)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-6)


def test_fixed_scale_is_that_of_static_formats_and_above_zero(store: Any) -> None:
    stored = store(W8A8S, LayerShape(4, 8))
    assert activation_scale(stored) is stored.tensors["activation_scale"]
    stored.tensors["activation_scale"].zero_()
    assert activation_scale(stored) is None
    assert activation_scale(store(W8A8, LayerShape(4, 8))) is None


def test_zero_token_gives_its_bias() -> None:
    weight = torch.arange(-4.0, 4.0).view(2, 4)
    layer = ReferenceLayer(weight, tensor([1.0, 2.0], torch.float32), W8A8, LayerShape(2, 4))
    assert layer(torch.zeros(3, 4)).tolist() == [[1.0, 2.0]] * 3


@settings(deadline=None)
@given(st.lists(st.integers(-128, 127), min_size=4, max_size=4), st.floats(1e-20, 1e20))
def test_integer_rows_are_recovered(codes: list[int], scale: float) -> None:
    weight = torch.tensor([codes]).float() * torch.tensor(scale).bfloat16().float()
    whole, found = integer_rows(weight)
    assert torch.equal(whole * found, weight) and whole.abs().max() <= max(map(abs, codes))
    assert torch.equal(whole, whole.round())


def test_integer_activations_refuse_other_weights() -> None:
    with pytest.raises(ApportionError, match="one 8-bit scale per row"):
        ReferenceLayer(torch.randn(4, 4), None, W8A8, LayerShape(4, 4))


@pytest.mark.parametrize("inputs", [64, 1024, 3000])
def test_integer_sums_are_exact(inputs: int) -> None:
    codes = torch.randint(90, 128, (6, inputs))
    x = torch.randint(90, 128, (5, inputs)).float()
    x[:, 0] = 127
    layer = ReferenceLayer(codes.float() * 0.5, None, W8A8, LayerShape(6, inputs))
    exact = (x.long() @ codes.t()).double() * 0.5
    assert torch.equal(layer(x), exact.float())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_layer_computes_in_its_dtype_and_keeps_that_of_its_input(dtype: str) -> None:
    format, weight, bias = Format(dtype), torch.randn(6, 8), torch.randn(6)
    x = torch.randn(2, 3, 8)
    y = ReferenceLayer(weight, bias, format, LayerShape(6, 8))(x)
    kind = format.torch_dtype
    expected = torch.nn.functional.linear(x.to(kind), weight.to(kind), bias.to(kind))
    assert y.dtype == torch.float32 and torch.equal(y, expected.float())


@pytest.mark.parametrize("groups", [1, 2])
def test_layer_is_the_convolution_it_stands_for(groups: int) -> None:
    conv = torch.nn.Conv2d(4, 6, (3, 2), (2, 1), (1, 0), (1, 2), groups)
    geometry = ConvGeometry((3, 2), (2, 1), (1, 0), (1, 2), groups)
    weight = conv.weight.detach().flatten(1)
    shape = LayerShape(6, weight.shape[1], geometry)
    layer = ReferenceLayer(weight, conv.bias, Format("float32"), shape)
    x = torch.randn(2, 4, 7, 8)
    assert torch.allclose(layer(x), conv(x), atol=1e-6)


def test_integer_convolution_scales_each_image() -> None:
    codes = torch.randint(-127, 128, (3, 18)).float()
    geometry = ConvGeometry((3, 3), (1, 1), (1, 1), (1, 1))
    layer = ReferenceLayer(codes * 0.25, torch.ones(3), W8A8, LayerShape(3, 18, geometry))
    x = torch.randint(-126, 127, (2, 2, 5, 5)).double()
    x[:, 0, 0, 0] = 127
    exact = torch.nn.functional.conv2d(x, codes.double().view(3, 2, 3, 3), padding=1) * 0.25 + 1
    assert torch.equal(layer(x.float()), exact.float())
    x[1] *= 7
    assert torch.equal(layer(x.float())[0], exact[0].float())
