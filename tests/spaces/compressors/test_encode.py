"""Outliers as options realize them: their count and bytes, and what they are worth."""

from dataclasses import replace

import pytest
import torch

from apportion.kernels.formats import LayerShape
from apportion.kernels.packing import unpack_mask
from apportion.kernels.positions import unpack_positions
from apportion.kernels.reference import reference_weight
from apportion.spaces.compressors.compose import InputStatistics, realize
from apportion.spaces.compressors.quantize import quantize
from apportion.spaces.grammar import parse_option

SHAPE = LayerShape(48, 64)


def _case(shape=SHAPE):
    """Student-t weights, three degrees of freedom, and what correlated inputs left."""
    random = torch.Generator().manual_seed(1)
    inputs = shape.in_features
    mix = torch.randn(inputs, inputs, generator=random, dtype=torch.float64)
    x = torch.randn(300, inputs, generator=random, dtype=torch.float64) @ mix
    normal = torch.randn(4, shape.out_features, inputs, generator=random)
    weight = 0.1 * normal[0] / (normal[1:] ** 2).mean(0).sqrt()
    return weight, InputStatistics(x.T @ x, 300)


def _realize(text, shape=SHAPE, seen=True):
    weight, statistics = _case(shape)
    return realize(weight, shape, parse_option(text), statistics if seen else None, "float32")


def _positions(stored):
    places, counts = (stored.tensors[f"outlier_{name}"] for name in ("places", "counts"))
    return unpack_positions(places, counts, stored.shape.weights)


OUTLIERS = """w3g16+o1% w3g16:awq+o1% w2:gptq+o1% w1.58g16+o5% w3g32:hqq+o0.5% w4g16s+o1%+r4
s50%+w3+o1% 2:4:sparsegpt+w3g32:gptq+o2%""".split()


@pytest.mark.parametrize("text", OUTLIERS)
def test_realize_keeps_the_exact_count_of_outliers_in_bfloat16(text):
    # a residual is added to outliers too
    stored = _realize(str(replace(parse_option(text), residual_rank=None)))
    positions = _positions(stored)
    option = parse_option(text)
    assert len(positions) == round(option.outlier_percent * SHAPE.weights / 100)
    found = reference_weight(stored).flatten()[positions]
    assert torch.equal(found, stored.tensors["outlier_values"].float())
    if option.sparsity is not None:
        assert unpack_mask(stored.tensors["mask"], SHAPE.weights)[positions].all()
    if "sparsegpt" not in text:
        assert torch.equal(found, _case()[0].flatten()[positions].bfloat16().float())


@pytest.mark.parametrize("text, seen", [("w3g16+o1%", False), ("w3g16:hqq+o1%", True)])
def test_realize_takes_the_largest_as_outliers_where_no_data_is_asked(text, seen):
    values = _realize(text, seen=seen).tensors["outlier_values"].float().abs()
    weight = _case()[0].abs().bfloat16().float().flatten()
    assert torch.equal(values.sort().values, weight.sort().values[-len(values) :])


@pytest.mark.parametrize(
    ("text", "than"),
    [
        ("w3g64+o1.9%", "w3g32"),
        ("w3g64:gptq+o1.9%", "w3g32:gptq"),
        ("w3g64:hqq+o1.9%", "w3g32:hqq"),
        ("w2g64+o1.9%", "w2g32"),
        ("w4g64s+o0.9%", "w4g32s"),
        ("s50%+w3g64+o1.9%", "s50%+w3g32"),
        ("w2g32+o1%+r4", "w2g32+r5"),
    ],
)
def test_outliers_of_heavy_tailed_weights_lose_less_in_no_more_bytes(text, than):
    shape = LayerShape(96, 128)
    weight, statistics = _case(shape)
    errors, sizes = [], []
    for option in (text, than):
        stored = _realize(option, shape)
        lost = (weight - reference_weight(stored)).double()
        errors.append(float(((lost @ statistics.second_moment) * lost).sum()))
        sizes.append(sum(tensor.nbytes for tensor in stored.tensors.values()))
    assert errors[0] < 0.9 * errors[1] and sizes[0] <= sizes[1]


def test_realize_fits_codes_as_if_there_were_no_outliers():
    stored = _realize("w3g16+o2%", seen=False)
    rest = torch.ones(SHAPE.weights, dtype=torch.bool)
    rest[_positions(stored)] = False
    alone = quantize(_case()[0], 3, 16, kept=rest.view(48, 64))
    assert torch.equal(stored.tensors["scale"], alone.scale)
    assert torch.equal(stored.tensors["zero"], alone.zero)
