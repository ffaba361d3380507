"""Options done to one weight: stored tensors, bytes, methods and refusals."""

from dataclasses import replace
from decimal import Decimal

import pytest
import torch

from apportion.errors import InvalidInput
from apportion.kernels.codes import middle
from apportion.kernels.formats import ConvGeometry, LayerShape, stored_bytes
from apportion.kernels.packing import unpack_mask
from apportion.kernels.reference import reference_weight
from apportion.spaces.compressors.compose import (
    InputStatistics,
    effective_methods,
    format_of,
    realize,
    refusal,
)
from apportion.spaces.compressors.quantize import quantize
from apportion.spaces.grammar import parse_option

SHAPE = LayerShape(48, 64)
CONV = LayerShape(16, 72, ConvGeometry((3, 3), (1, 1), (1, 1), (1, 1)))
WIDE = LayerShape(48, 32 * 9, CONV.conv)
GROUPED = LayerShape(16, 72, ConvGeometry((3, 3), (1, 1), (1, 1), (1, 1), groups=2))
POINTWISE = LayerShape(16, 72, ConvGeometry((1, 1), (1, 1), (0, 0), (1, 1)))
REALIZED = """dense f32 bf16 w2 w2g32 w3g64 w4g16 w4g32s w8 w8g32 w8a8 s50% s62.5%:magnitude
r50%:svd r50% w4g64+r4 s50%+r8 s60%+w3g64 s50%:wanda+w4g32s:rtn+r4:svd s50%+w8 w5g32 w6 w6g16s
w1.58 w1.58g16 s50%+w1.58g16 s50%+w5 w1.58g16+r8 w3g32:hqq s50%+w4:hqq 2:4 4:8:magnitude 2:4+w4g32
2:4:wanda+w1.58g16+r4:svd w3g32:gptq w4g16s:gptq w8:gptq w1.58g16:gptq s50%:sparsegpt
2:4:sparsegpt s50%:sparsegpt+w3g32:gptq+r4 2:4+w4g32:gptq w3g16+o1% w2g32+o5%+r4 w1.58g16+o2%
s50%+w3+o1% w3g16:gptq+o1% w3g16:hqq+o1% 2:4:sparsegpt+w3g32:gptq+o3%+r4 w3g32:awq w8:awq
s50%+w4g16s:awq 2:4:sparsegpt+w3g32:awq+o3%+r4""".split()


def _case(shape=SHAPE, seed=0):
    random = torch.Generator().manual_seed(seed)
    inputs = shape.in_features
    mix = torch.randn(inputs, inputs, generator=random, dtype=torch.float64)
    x = torch.randn(300, inputs, generator=random, dtype=torch.float64) @ mix
    weight = torch.randn(shape.out_features, inputs, generator=random) * 0.1
    return weight, InputStatistics(x.T @ x, 300)


def _realize(text, shape=SHAPE, dtype="float32", seen=True):
    weight, statistics = _case(shape)
    return realize(weight, shape, parse_option(text), statistics if seen else None, dtype)


def _output_error(text, **more):
    weight, statistics = _case()
    lost = weight.double() - reference_weight(_realize(text, **more)).double()
    return float(((lost @ statistics.second_moment) * lost).sum())


@pytest.mark.parametrize("text", REALIZED)
def test_realize_leaves_weights_and_statistics_as_they_are(text):
    weight, statistics = _case()
    weight, moment = weight.T.contiguous().T, statistics.second_moment
    before = weight.clone(), moment.clone()
    realize(weight, SHAPE, parse_option(text), statistics, "float32")
    assert torch.equal(weight, before[0]) and torch.equal(moment, before[1])


@pytest.mark.parametrize("seen", [True, False])
@pytest.mark.parametrize("text", [text for text in REALIZED if ":" not in text])
def test_realize_stores_the_bytes_its_format_promises(text, seen):
    stored = _realize(text, seen=seen)
    assert stored.format == format_of(parse_option(text), SHAPE, "float32")
    nonzeros = None
    if stored.format.sparse:
        nonzeros = int(unpack_mask(stored.tensors["mask"], SHAPE.weights).sum())
    total = sum(tensor.nbytes for tensor in stored.tensors.values())
    assert total == stored_bytes(stored.format, SHAPE, nonzeros)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("text", REALIZED)
def test_realize_is_near_in_its_outputs_in_every_model_dtype(text, dtype):
    weight, statistics = _case()
    energy = ((weight.double() @ statistics.second_moment) * weight).sum()
    # rank 8 of a random 48 x 64 matrix must lose 0.58; a wrong layout or scale loses 1 and more
    assert _output_error(text, dtype=dtype) < 0.65 * energy


@pytest.mark.parametrize("text, dtype", [("dense", "float32"), ("f32", "bfloat16")])
def test_realize_dense_is_exact_and_owns_its_memory(text, dtype):
    weight, _ = _case()
    stored = realize(weight, SHAPE, parse_option(text), None, dtype)
    assert torch.equal(stored.tensors["weight"], weight)
    assert stored.tensors["weight"].data_ptr() != weight.data_ptr()


@pytest.mark.parametrize("text", ["w1.58g32", "w2g32", "w3", "w4g32s", "w6", "w8", "w8a8"])
def test_realize_stores_exactly_what_the_search_computed(text):
    weight, statistics = _case()
    option = parse_option(text)
    importance = statistics.second_moment.diagonal()
    found = quantize(weight, option.bits, option.group, option.symmetric, None, importance)
    size = option.group or SHAPE.in_features
    values = (found.codes.float() - middle(option.bits)) * _wide(found.scale, size)
    if found.zero is not None:
        values += _wide(found.zero, size)
    assert torch.equal(reference_weight(_realize(text)), values)


def _wide(per_group, size):
    return per_group.float().repeat_interleave(size, 1)


@pytest.mark.parametrize("text", ["s62.5%", "s62.5%:magnitude", "s62.5%+w4g32"])
def test_realize_sparse_keeps_the_exact_count(text):
    stored = _realize(text)
    assert int(unpack_mask(stored.tensors["mask"], SHAPE.weights).sum()) == 1152
    assert int(torch.count_nonzero(reference_weight(stored))) <= 1152


@pytest.mark.parametrize("text", ["2:4", "2:4:magnitude", "2:4+w4g8", "2:4+w1.58g8"])
@pytest.mark.parametrize("shape", [SHAPE, POINTWISE])
def test_realize_of_a_pattern_keeps_n_of_m_inputs_and_stores_no_others(text, shape):
    stored = _realize(text, shape)
    kept = unpack_mask(stored.tensors["mask"], shape.weights)
    assert (kept.reshape(-1, 4).sum(1) == 2).all() and stored.nonzeros == shape.weights // 2
    values = reference_weight(stored).flatten()
    assert not torch.count_nonzero(values[~kept])


def test_realize_of_a_pattern_removes_what_its_method_says():
    weight, statistics = _case()
    scores = {"2:4:magnitude": weight.abs().double()}
    scores["2:4"] = scores["2:4:magnitude"] * statistics.second_moment.diagonal().sqrt()
    for text, score in scores.items():
        mask = unpack_mask(_realize(text).tensors["mask"], SHAPE.weights).reshape(-1, 4)
        removed = score.reshape(-1, 4).masked_fill(mask, 0).amax(1)
        assert (removed < score.reshape(-1, 4).masked_fill(~mask, torch.inf).amin(1)).all()


@pytest.mark.parametrize("text", ["w3g32:hqq", "w2:hqq"])
def test_realize_by_hqq_does_not_depend_on_statistics(text):
    seen, unseen = _realize(text).tensors, _realize(text, seen=False).tensors
    assert all(torch.equal(seen[name], unseen[name]) for name in ("codes", "scale", "zero"))
    assert not torch.equal(seen["zero"], _realize(text.removesuffix(":hqq")).tensors["zero"])


@pytest.mark.parametrize(
    ("better", "than"),
    [
        ("w3g32:gptq", "w3g32"),
        ("w3:gptq", "w3"),
        ("w4g32s:gptq", "w4g32s"),
        ("w1.58g32:gptq", "w1.58g32"),
        ("s30%:sparsegpt", "s30%"),
        ("2:4:sparsegpt", "2:4"),
        ("s50%+w3g32:gptq", "s50%+w3g32"),
        ("2:4:sparsegpt+w3g32:gptq", "2:4+w3g32:gptq"),
        ("w3g32:gptq+o1%", "w3g32+o1%"),
        ("w3g32:gptq+o1%", "w3g32:gptq"),
    ],
)
def test_what_makes_up_for_errors_loses_less(better: str, than: str):
    assert _output_error(better) < 0.9 * _output_error(than)


def test_realize_more_bits_lose_less():
    errors = [_output_error(f"w{bits}g32") for bits in ("1.58", "2", "3", "4", "5", "6", "8")]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("base", ["w2g32", "s60%", "s50%+w3g32", "w1.58g32", "2:4", "w2g32:hqq"])
def test_realize_residual_repairs_and_whitening_repairs_more(base):
    unrepaired, plain, whitened = (
        _output_error(base + end) for end in ("", "+r8:svd", "+r8:whitened")
    )
    assert whitened < plain < unrepaired


def test_realize_defaults_use_statistics():
    assert _output_error("s50%") < _output_error("s50%:magnitude")
    assert _output_error("r50%") < _output_error("r50%:svd")
    assert _output_error("w2g32") < _output_error("w2g32", seen=False)


def test_effective_methods_falls_back_without_statistics():
    option = parse_option("s50%+w4+r8")
    assert effective_methods(option, True) == {"s": "wanda", "w": "rtn", "residual": "whitened"}
    assert effective_methods(option, False) == {"s": "magnitude", "w": "rtn", "residual": "svd"}


@pytest.mark.parametrize(
    "text", ["s50%:wanda", "r50%:whitened", "w4+r8:whitened", "w4:gptq", "w4:awq", "2:4:sparsegpt"]
)
def test_effective_methods_refuses_asked_methods_without_statistics(text):
    with pytest.raises(InvalidInput, match="needs calibration statistics"):
        effective_methods(parse_option(text), False)


@pytest.mark.parametrize(
    "text, shape, reason",
    [
        ("w4g96", LayerShape(8, 2048), "group 96 does not divide 2048 inputs; nearest: w4g64, w4g"),
        ("s50%+w3g48s", SHAPE, "group 48 does not divide 64 inputs; nearest: s50%+w3g32s, s50%+w"),
        ("w4g128", LayerShape(8, 96), "nearest: w4g96"),
        ("w4g16s", LayerShape(8, 7), "nearest: w4"),
        ("r5%", SHAPE, "a multiple of 8 and saves parameters; nearest: r29.2%"),
        ("r50%", LayerShape(8, 8), "r50% of [8, 8] is no rank"),
        ("w4+r48", SHAPE, "rank 48 does not fit [48, 64]; at most: w4+r47"),
        ("r50%", CONV, "no rank that is a multiple of 8 and saves parameters"),
        ("r5%", WIDE, "a multiple of 8 and saves parameters; nearest: r12.3%"),
        ("r50%", GROUPED, "rP% is not realized for grouped convolutions"),
        ("w4+r8", CONV, "+rK is not realized for convolutions"),
        ("drop", SHAPE, "drop is for blocks and sub-blocks"),
        ("w1.58g48", SHAPE, "nearest: w1.58g32, w1.58g64"),
        ("w1.58g16", LayerShape(8, 7), "nearest: w1.58"),
        ("2:4", LayerShape(8, 30), "a multiple of 4 inputs, not 30; nearest: 2:3, 2:5"),
        ("2:4+w4", LayerShape(8, 7), "nearest: 4:7+w4"),
        ("1:8", LayerShape(8, 36), "nearest: 1:6, 1:9"),
        ("2:4", LayerShape(8, 1), "nearest: s50%"),
        ("w3+o0.01%", SHAPE, "o0.01% of [48, 64] is no weight; nearest: w3+o0.1%"),
        ("w3+o1%", LayerShape(4, 8), "is no weight; nearest: w3+o3.2%"),
        ("s60%+w3+o50%+r4", SHAPE, "leaves no weight to round; nearest: s60%+w3+o39.9%+r4"),
        ("2:4+w3+o99%", LayerShape(8, 8), "leaves no weight to round; nearest: 2:4+w3+o48.4%"),
        ("w3+o50%", LayerShape(1, 1), "o50% of [1, 1] is no weight"),
        ("4:8", CONV, "for kernels of 1 x 1, not 3 x 3; nearest: s50%"),
        ("1:3:magnitude+w4", CONV, "nearest: s66.7%:magnitude+w4"),
        ("w4:awq", CONV, "awq is realized for kernels of 1 x 1, not 3 x 3; nearest: w4"),
        ("s50%:magnitude+w4:awq", GROUPED, "have none; nearest: s50%:magnitude+w4"),
    ],
)
def test_refusal_names_the_reason_and_what_fits(text, shape, reason):
    assert reason in (refusal(parse_option(text), shape) or "")
    with pytest.raises(InvalidInput, match="option"):
        format_of(parse_option(text), shape, "float32")


@pytest.mark.parametrize("shape", [SHAPE, LayerShape(192, 512), LayerShape(100, 31), WIDE])
@pytest.mark.parametrize("multiple", [1, 8, 16])
def test_refusal_of_a_rank_names_the_smallest_percentage_that_fits(shape, multiple):
    reason = refusal(parse_option("r0.001%"), shape, multiple) or ""
    nearest = parse_option(reason.rpartition("nearest: ")[2])
    assert format_of(nearest, shape, "float32", multiple).rank == multiple
    below = replace(nearest, rank_percent=nearest.rank_percent - Decimal("0.1"))
    assert refusal(below, shape, multiple) is not None


@pytest.mark.parametrize("seen", [True, False])
def test_realize_of_a_rank_is_tucker_form_for_larger_kernels_and_a_pair_for_others(seen):
    stored = _realize("r50%", shape=WIDE, seen=seen)
    format, tensors = stored.format, stored.tensors
    assert format.input_rank is not None and sorted(tensors) == ["core", "left", "right"]
    total = sum(tensor.nbytes for tensor in tensors.values())
    assert total == stored_bytes(format, WIDE) <= WIDE.weights * 4 / 2
    assert sorted(_realize("r90%", shape=POINTWISE, seen=seen).tensors) == ["left", "right"]


def test_realize_of_a_rank_of_a_convolution_uses_statistics():
    weight, statistics = _case(WIDE)
    errors = {}
    for text in ("r50%", "r50%:svd"):
        lost = weight.double() - reference_weight(_realize(text, shape=WIDE)).double()
        errors[text] = float(((lost @ statistics.second_moment) * lost).sum())
    assert errors["r50%"] < 0.9 * errors["r50%:svd"]


@pytest.mark.parametrize("text", ["dense", "w4g8", "w3", "w6g9", "s50%", "s50%+w8", "w8a8"])
def test_realize_works_on_a_convolution_as_a_matrix(text):
    weight, _ = _case(CONV)
    values = reference_weight(_realize(text, shape=CONV, seen=False))
    assert (values - weight).norm() < 0.6 * weight.norm()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_realize_refuses_what_is_not_finite(value):
    weight, statistics = _case()
    bad_weight, bad_moment = weight.clone(), statistics.second_moment.clone()
    bad_weight[3, 5] = bad_moment[1, 1] = value
    option = parse_option("w4")
    with pytest.raises(InvalidInput, match="weight holds values that are not finite"):
        realize(bad_weight, SHAPE, option, None, "float32")
    with pytest.raises(InvalidInput, match="calibration inputs hold values"):
        realize(weight, SHAPE, option, InputStatistics(bad_moment, 300), "float32")


def test_realize_refuses_shapes_that_differ_from_the_layer():
    weight, statistics = _case()
    with pytest.raises(InvalidInput, match=r"weight is \[64, 48\], its layer \[48, 64\]"):
        realize(weight.T, SHAPE, parse_option("w4"), None, "float32")
    with pytest.raises(InvalidInput, match=r"statistics are \[64, 64\]"):
        realize(weight[:, :32], LayerShape(48, 32), parse_option("w4"), statistics, "float32")


@pytest.mark.parametrize(
    "text",
    ["w1.58", "w2g32", "w4g32s", "w4:hqq", "w8", "s50%", "s50%+w3", "2:4", "r50%", "w3+r4"]
    + ["w3g32+o1%", "w3g32:awq"],
)
def test_realize_of_zeros_is_zeros(text):
    _, statistics = _case()
    stored = realize(torch.zeros(48, 64), SHAPE, parse_option(text), statistics, "float32")
    assert torch.count_nonzero(reference_weight(stored)) == 0
