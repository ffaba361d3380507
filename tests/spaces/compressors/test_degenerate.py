"""What is degenerate, under every option: a finite result within a bound, or the exact error."""

import re
from functools import lru_cache

import pytest
import torch

from apportion.errors import InvalidInput
from apportion.kernels.formats import ConvGeometry, LayerShape
from apportion.kernels.packing import unpack_mask
from apportion.kernels.reference import reference_weight
from apportion.spaces.compressors.compose import InputStatistics, format_of, realize, refusal
from apportion.spaces.grammar import parse_option

SHAPE = LayerShape(24, 64)
GEOMETRY = ConvGeometry((3, 3), (1, 1), (1, 1), (1, 1))
CONV = LayerShape(24, 32 * 9, GEOMETRY)
OPTIONS = """f32 bf16 w1.58 w1.58g16 w1.58g16:gptq w2g16 w2g16s w2g16:gptq w2g16:hqq w3 w3:gptq
w3:hqq w3g16s:gptq w4g16 w5g16 w6g16 w8 w8g16:gptq w8a8 s50% s50%:magnitude s50%:sparsegpt 2:4
2:4:magnitude 2:4:sparsegpt r75% r75%:svd s50%+w3g16 s50%:sparsegpt+w3g16:gptq s50%+r4 s50%+w8
2:4:sparsegpt+w4g16s:gptq s50%:magnitude+w3g16:hqq w2g16+r4 w2g16:gptq+r4 w2g16+r4:svd w3g16+o1%
w3g16:gptq+o1% w3g16:hqq+o1% w1.58g16:gptq+o2%+r4 s50%:sparsegpt+w3g16:gptq+o1%+r4
w2g16:awq w3:awq w8:awq w1.58g16:awq s50%:sparsegpt+w4g16s:awq+o1%+r4""".split()
TUCKER = ["r50%", "r25%", "r50%:svd"]
LAYERS = [pytest.param(SHAPE, text, id=text) for text in OPTIONS]
LAYERS += [pytest.param(CONV, text, id=f"{text} of a convolution") for text in TUCKER]
ROW = 3
METHODS = re.compile(":(?:awq|gptq|sparsegpt|wanda|whitened)")


def random_weight(shape):
    random = torch.Generator().manual_seed(shape.in_features)
    return torch.randn(shape.out_features, shape.in_features, generator=random) * 0.1


def healthy(inputs):
    random = torch.Generator().manual_seed(1)
    mix = torch.randn(inputs, inputs, generator=random, dtype=torch.float64)
    return torch.randn(2 * inputs, inputs, generator=random, dtype=torch.float64) @ mix


def rounded(x):
    """The sum of float32 products: slightly indefinite where it is singular."""
    return (x.float().T @ x.float()).double()


def number(x):
    return torch.arange(x.shape[1])


MOMENTS = {
    "no token": lambda x: x[:0].T @ x[:0],
    "all zero": lambda x: x.T @ x * 0,
    "one token": lambda x: x[:1].T @ x[:1],
    "constant": lambda x: torch.full_like(x, 3.0).T @ torch.full_like(x, 3.0),
    "few tokens": lambda x: x[:5].T @ x[:5],
    "indefinite": lambda x: rounded(x[:5]),
    "repeated": lambda x: (y := x[:, : x.shape[1] // 2].repeat(1, 2)).T @ y,
    "one live input": lambda x: (y := x * (number(x) == 7)).T @ y,
    "dead inputs": lambda x: (y := x * (number(x) % 3 > 0)).T @ y,
    "dead group": lambda x: (y := x * (number(x) // 16 != 1)).T @ y,
    "huge": lambda x: x.T @ x * 1e60,
    "tiny": lambda x: x.T @ x * 1e-60,
}


@lru_cache
def moment_of(kind, inputs):
    return MOMENTS[kind](healthy(inputs)) if kind else rounded(healthy(inputs))


def realized(text, weight, shape=SHAPE, moment=None, dtype="float32"):
    statistics = None if moment is None else InputStatistics(moment, 2 * len(moment))
    return realize(weight, shape, parse_option(text), statistics, dtype)


def plainly(text):
    """The option without the methods that need statistics."""
    return METHODS.sub("", text)


def output_error(lost, moment):
    """The squared error of the outputs, of inputs that all have 1 % of the live ones' noise."""
    live = moment.diagonal()[moment.diagonal() > 0]
    noise = 0.01 * live.mean() if len(live) else 1.0
    return float(((lost.double() @ moment) * lost).sum() + noise * lost.double().square().sum())


@pytest.mark.parametrize("kind", MOMENTS)
@pytest.mark.parametrize(("shape", "text"), LAYERS)
def test_inputs_of_every_kind_leave_an_option_about_as_good_as_without_statistics(
    shape, text, kind
):
    weight, moment = random_weight(shape), moment_of(kind, shape.in_features)
    lost = weight - reference_weight(realized(text, weight, shape, moment))
    assert lost.isfinite().all() and lost.norm() < weight.norm()
    plain = weight - reference_weight(realized(plainly(text), weight, shape))
    error, all_of_it = output_error(lost, moment), output_error(weight, moment)
    # 8 bits lose so little that another scale is ten times as much, and still nothing
    assert error <= max(1.25 * output_error(plain, moment), 1e-3 * all_of_it)


@pytest.mark.parametrize("kind", ["no token", "all zero"])
@pytest.mark.parametrize(
    ("shape", "text"), [layer for layer in LAYERS if "+o" not in str(layer.id)]
)
def test_inputs_never_seen_are_as_no_statistics(shape, text, kind):
    # but for outliers: those of the largest rounding error, and without statistics the largest
    weight = random_weight(shape)
    found = realized(text, weight, shape, moment_of(kind, shape.in_features))
    if text.startswith("s50%") and not text.startswith(("s50%:sparsegpt", "s50%:magnitude")):
        mask = unpack_mask(found.tensors["mask"], shape.weights).view_as(weight)
        removed = weight.abs().where(~mask, 0).amax(1)
        assert (removed < weight.abs().where(mask, torch.inf).amin(1)).all()
    else:
        plain = realized(plainly(text), weight, shape)
        torch.testing.assert_close(reference_weight(found), reference_weight(plain))


@pytest.mark.parametrize("text", ["s20%", "s20%:sparsegpt", "2:4", "2:4:sparsegpt"])
def test_weights_of_dead_inputs_go_first_and_the_smallest_of_them(text):
    weight, moment = random_weight(SHAPE), moment_of("dead group", 64)
    stored = realized(text, weight, SHAPE, moment)
    mask = unpack_mask(stored.tensors["mask"], SHAPE.weights).view_as(weight)
    dead, kept = weight[:, 16:32].abs(), mask[:, 16:32]
    if text.startswith("2:4"):
        groups = dead.reshape(-1, 4).masked_fill(kept.reshape(-1, 4), 0)
        assert (groups.amax(1) <= dead.reshape(-1, 4).sort(1).values[:, 1]).all()
    elif text == "s20%":  # 12.8 of the 16 in each row
        assert mask[:, :16].all() and mask[:, 32:].all()
        assert (dead.where(~kept, 0).amax(1) < dead.where(kept, torch.inf).amin(1)).all()
    else:
        assert mask[:, :16].all() and mask[:, 32:].all()
        assert dead[~kept].max() < dead[kept].min()


@pytest.mark.parametrize("kind", [None, "dead inputs", "constant"])
@pytest.mark.parametrize(("shape", "text"), LAYERS)
def test_dead_output_channel_stays_dead(shape, text, kind):
    weight = random_weight(shape)
    weight[ROW] = 0
    found = reference_weight(realized(text, weight, shape, moment_of(kind, shape.in_features)))
    # what factors stand for is zero to rounding, all else is exact
    assert found[ROW].abs().max() <= (1e-9 if re.search(r"\br\d", text) else 0)


def zero_group(weight):
    return weight.clone().index_fill_(1, torch.arange(16, 32), 0)


def one_far_off(weight):
    far = weight.clone()
    far[2, 4] = 1e30
    return far


WEIGHTS = {
    "zero group": zero_group,
    "zero": torch.zeros_like,
    "constant": lambda weight: torch.full_like(weight, 0.37),
    "one far off": one_far_off,
    "large": lambda weight: weight * 1e30,
    "small": lambda weight: weight * 1e-30,
}


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize(("shape", "text"), LAYERS)
def test_weights_of_every_kind_are_better_kept_than_left_out(shape, text, kind):
    weight = WEIGHTS[kind](random_weight(shape))
    moment = moment_of(None, shape.in_features)
    found = reference_weight(realized(text, weight, shape, moment))
    assert found.isfinite().all()
    # in double: squares of such weights are none of float32
    error = output_error(weight.double() - found.double(), moment)
    assert error <= output_error(weight.double(), moment)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(("shape", "text"), [*LAYERS, (SHAPE, "dense")])
def test_what_is_not_finite_is_refused_by_every_option(shape, text, bad):
    weight, moment = random_weight(shape), moment_of(None, shape.in_features)
    wrong = weight.clone()
    wrong[ROW, 5] = bad
    with pytest.raises(InvalidInput, match="weight holds values that are not finite"):
        realized(text, wrong, shape, moment)
    wrong = moment.clone()
    wrong[7, 7] = bad
    with pytest.raises(InvalidInput, match="calibration inputs hold values that are not finite"):
        realized(text, weight, shape, wrong)


@pytest.mark.parametrize(
    "text", ["bf16", "w1.58", "w2g16", "w4:gptq", "w3g16+r4", "w3:hqq", "w3:awq"]
)
def test_weights_beyond_bfloat16_are_refused(text):
    weight = torch.full((24, 64), torch.finfo(torch.float32).max)
    with pytest.raises(
        InvalidInput, match=rf'"{re.escape(text)}": .* beyond the range of bfloat16'
    ):
        realized(text, weight, SHAPE, moment_of(None, 64))


@pytest.mark.parametrize("text", ["s50%:sparsegpt", "r75%"])
def test_what_grows_beyond_float16_is_refused(text):
    weight = torch.full((24, 64), 6e4)
    with pytest.raises(InvalidInput, match=rf'"{re.escape(text)}": .* beyond the range of float16'):
        realized(text, weight, SHAPE, moment_of("constant", 64), "float16")


ODD = {
    "1 x 1": LayerShape(1, 1),
    "1 x 8": LayerShape(1, 8),
    "8 x 1": LayerShape(8, 1),
    "7 x 10": LayerShape(7, 10),
    "13 x 31": LayerShape(13, 31),
    "24 x 40": LayerShape(24, 40),
    "3 x 27": LayerShape(3, 27, GEOMETRY),
    "depthwise": LayerShape(16, 9, ConvGeometry((3, 3), (1, 1), (1, 1), (1, 1), groups=16)),
}
ASKED = [
    *OPTIONS,
    "w4g48",
    "w3g64s:gptq+o1%",
    "s50%+w3g7",
    "3:5",
    "w4+r64",
    "r99%",
    "r1%",
    "w3+o99%",
]


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("text", ASKED)
def test_option_fits_a_layer_or_is_refused_with_one_that_does(text, name):
    shape = ODD[name]
    option, weight = parse_option(text), random_weight(shape)
    reason = refusal(option, shape)
    if reason is None:
        grouped = shape.conv is not None and shape.conv.groups > 1
        moment = None if grouped else moment_of(None, shape.in_features)
        assert reference_weight(realized(text, weight, shape, moment)).isfinite().all()
        return
    with pytest.raises(InvalidInput, match=re.escape(f'option "{text}": {reason}')):
        format_of(option, shape, "float32")
    _, told, nearest = reason.rpartition("nearest: ")
    if not told:
        return
    for other in nearest.split(", "):
        # what is named mends what is told; the next reason may be another one
        assert refusal(parse_option(other), shape) != reason


@pytest.mark.parametrize(
    "text", ["s50%:wanda", "s50%:sparsegpt+w4", "w4:gptq", "w4:awq", "2:4:sparsegpt"]
)
def test_method_that_needs_inputs_is_refused_for_grouped_convolutions(text):
    point = LayerShape(16, 4, ConvGeometry((1, 1), (1, 1), (0, 0), (1, 1), groups=2))
    assert "grouped convolutions have none; nearest: " in (refusal(parse_option(text), point) or "")
    assert refusal(parse_option(plainly(text)), point) is None
