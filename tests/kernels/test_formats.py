import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from apportion.errors import InvalidInput
from apportion.kernels.codes import CODE_BITS, TERNARY_BITS
from apportion.kernels.formats import (
    ConvGeometry,
    Format,
    LayerShape,
    StoredWeight,
    layout,
    stored_bytes,
)

SHAPE = LayerShape(48, 64)
CONV = LayerShape(8, 18, ConvGeometry((3, 3), (2, 1), (1, 1), (1, 1), groups=2))


@st.composite
def formats(draw: st.DrawFn) -> Format:
    dtype = draw(st.sampled_from(["float32", "bfloat16", "float16"]))
    if draw(st.booleans()) and draw(st.booleans()):
        return Format(dtype, rank=draw(st.integers(1, 24)))
    bits = draw(st.sampled_from([None, *CODE_BITS]))
    residual = draw(st.sampled_from([None, 4]))
    common: dict[str, Any] = {"sparse": draw(st.booleans()), "residual_rank": residual}
    if bits is None:
        return Format(dtype, **common)
    group = draw(st.sampled_from([None, 2, 16, 64]))
    symmetric = bits == TERNARY_BITS or draw(st.booleans())
    outliers = None if bits == 8 else draw(st.none() | st.integers(1, 99))
    common |= {"outliers": outliers, "input_scaled": draw(st.booleans())}
    if bits == 8 and draw(st.booleans()):
        static = draw(st.booleans())
        return Format(dtype, 8, None, True, activation_bits=8, static_activations=static)
    return Format(dtype, bits, group, symmetric, **common)


@given(formats(), st.integers(0, 5))
def test_stored_bytes_are_the_bytes_of_the_tensors(format: Format, seed: int) -> None:
    nonzeros = 900 + seed if format.sparse else None
    tensors = [torch.empty(s, dtype=d) for d, s in layout(format, SHAPE, nonzeros).values()]
    assert stored_bytes(format, SHAPE, nonzeros) == sum(t.nbytes for t in tensors)


@pytest.mark.parametrize(
    ("format", "nonzeros", "expected"),
    [
        (Format("float32"), None, 48 * 64 * 4),
        (Format("bfloat16", sparse=True), 1001, 48 * 64 // 8 + 1001 * 2),
        (Format("float32", 4, 16), None, 48 * 64 // 2 + 48 * 4 * 2 * 2),
        (Format("float32", 8, symmetric=True), None, 48 * 64 + 48 * 2),
        (Format("float32", 3, 32, sparse=True), 1001, 384 + 376 + 48 * 2 * 2 * 2),
        (Format("float32", 5, 16), None, 48 * 64 * 5 // 8 + 48 * 4 * 2 * 2),
        (Format("float32", 6, symmetric=True), None, 48 * 64 * 6 // 8 + 48 * 2),
        (Format("float32", 1.58, 32, symmetric=True), None, 615 + 48 * 2 * 2),
        (Format("float32", 1.58, symmetric=True, sparse=True), 1001, 384 + 201 + 48 * 2),
        (Format("float32", 3, 32, outliers=31), None, 1152 + 384 + 31 * 3 + 6),
        (Format("float32", 2, 64, sparse=True, outliers=100), 1001, 384 + 251 + 192 + 300 + 14),
        (Format("float32", 4, 16, input_scaled=True), None, 48 * 64 // 2 + 48 * 16 + 64 * 2),
        (
            Format("bfloat16", 8, symmetric=True, activation_bits=8, static_activations=True),
            None,
            48 * 64 + 48 * 2 + 4,
        ),
        (Format("float32", rank=10), None, 112 * 10 * 4),
        (Format("float32", 2, 64, residual_rank=3), None, 768 + 192 + 112 * 3 * 2),
    ],
)
def test_stored_bytes_by_hand(format: Format, nonzeros: int | None, expected: int) -> None:
    assert stored_bytes(format, SHAPE, nonzeros) == expected


def test_tucker_form_has_a_core_between_two_matrices() -> None:
    geometry = ConvGeometry((3, 2), (2, 1), (1, 1), (1, 1))
    wanted = layout(Format("bfloat16", rank=4, input_rank=5), LayerShape(8, 66, geometry))
    sizes = {name: size for name, (_, size) in wanted.items()}
    assert sizes == {"left": (8, 4), "core": (4, 30), "right": (5, 11)}


@pytest.mark.parametrize("shape", [SHAPE, CONV])
def test_tucker_form_is_for_convolutions_without_groups(shape: LayerShape) -> None:
    with pytest.raises(InvalidInput, match="convolutions without groups"):
        stored_bytes(Format("float32", rank=4, input_rank=4), shape)


@given(formats())
def test_formats_come_back_from_json(format: Format) -> None:
    assert Format.from_json(json.loads(json.dumps(format.to_json()))) == format


def test_formats_that_have_no_later_field_are_described_as_before_there_were_any() -> None:
    described = "activation_bits bits dtype group rank residual_rank sparse symmetric"
    assert sorted(Format("float32", 4, 64).to_json()) == described.split()
    tucker = Format("float32", rank=4, input_rank=3)
    assert Format.from_json(json.loads(json.dumps(tucker.to_json()))) == tucker


@pytest.mark.parametrize("shape", [SHAPE, CONV])
def test_shapes_come_back_from_json(shape: LayerShape) -> None:
    assert LayerShape.from_json(json.loads(json.dumps(shape.to_json()))) == shape


def test_unknown_field_is_refused() -> None:
    with pytest.raises(InvalidInput, match="unknown field 'color'"):
        Format.from_json({"dtype": "float32", "color": "red"})


@pytest.mark.parametrize(
    "parts",
    [
        {"dtype": "int8"},
        {"bits": 7},
        {"bits": 1.5},
        {"bits": 1.58},
        {"bits": 1.58, "symmetric": True, "activation_bits": 8},
        {"group": 64},
        {"bits": 4, "group": 0},
        {"bits": 4, "activation_bits": 8},
        {"bits": 8, "activation_bits": 8},
        {"bits": 8, "symmetric": True, "activation_bits": 8, "group": 64},
        {"rank": 8, "bits": 4},
        {"input_rank": 8},
        {"rank": 8, "input_rank": 8, "bits": 4},
        {"outliers": 5},
        {"bits": 8, "symmetric": True, "outliers": 5},
        {"bits": 4, "outliers": 0},
        {"input_scaled": True},
        {"rank": 8, "input_scaled": True},
        {"bits": 8, "symmetric": True, "activation_bits": 8, "input_scaled": True},
        {"static_activations": True},
        {"bits": 8, "symmetric": True, "static_activations": True},
    ],
)
def test_contradictions_are_refused(parts: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput, match="^format: "):
        Format(**{"dtype": "float32", **parts})


def test_group_that_does_not_divide_is_refused() -> None:
    with pytest.raises(InvalidInput, match="group 48 does not divide 64 inputs"):
        stored_bytes(Format("float32", 4, 48), SHAPE)


def test_bytes_of_a_sparse_weight_need_its_nonzeros() -> None:
    with pytest.raises(InvalidInput, match="nonzeros"):
        stored_bytes(Format("float32", sparse=True), SHAPE)


@pytest.mark.parametrize("spoil", ["drop", "add", "shape", "dtype"])
def test_stored_weight_of_wrong_tensors_is_refused(spoil: str, store: Any) -> None:
    good = store(Format("float32", 4, 16), SHAPE)
    tensors = dict(good.tensors)
    if spoil == "drop":
        del tensors["zero"]
    elif spoil == "add":
        tensors["extra"] = tensors["zero"]
    else:
        scale = tensors["scale"]
        tensors["scale"] = scale[:, :1] if spoil == "shape" else scale.float()
    with pytest.raises(InvalidInput, match="^stored weight: "):
        StoredWeight(good.format, good.shape, tensors)


def test_mask_decides_how_much_a_sparse_weight_holds(store: Any) -> None:
    good = store(Format("float32", sparse=True), SHAPE)
    fewer = {**good.tensors, "mask": torch.zeros_like(good.tensors["mask"])}
    with pytest.raises(InvalidInput, match="values is"):
        replace(good, tensors=fewer)
