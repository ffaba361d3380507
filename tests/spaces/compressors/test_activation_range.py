"""Static activations: one scale, of the largest input that calibration saw."""

from dataclasses import replace

import pytest
import torch

from apportion.errors import ApportionError, InvalidInput
from apportion.kernels.formats import ConvGeometry, LayerShape, stored_bytes
from apportion.kernels.reference import reference_layer
from apportion.spaces.calibration import collect
from apportion.spaces.compressors.activation_range import scale_of
from apportion.spaces.compressors.compose import (
    InputStatistics,
    effective_methods,
    realize,
    refusal,
)
from apportion.spaces.discovery import discover
from apportion.spaces.grammar import parse_option
from apportion.spaces.realization import realize_site
from apportion.spaces.statistics import StatisticsFiles, write_statistics

STATIC, DYNAMIC = parse_option("w8a8s"), parse_option("w8a8")
SHAPE = LayerShape(24, 32)
CONV = LayerShape(16, 72, ConvGeometry((3, 3), (1, 1), (1, 1), (1, 1)))
GROUPED = replace(CONV, conv=ConvGeometry((3, 3), (1, 1), (1, 1), (1, 1), groups=2))


def case(tokens=200):
    """A weight [out, in], inputs [tokens, in] of which some are large, and what is known of them"""
    random = torch.Generator().manual_seed(3)
    weight = torch.randn(24, 32, generator=random) * 0.1
    x = torch.randn(tokens, 32, generator=random) * (1 + 9 * (torch.arange(32) == 5))
    peak = x.abs().amax(0) if tokens else torch.zeros(32)
    return weight, x, InputStatistics((x.T @ x).double(), tokens, peak)


def test_largest_input_is_the_largest_code():
    weight, x, seen = case()
    stored = realize(weight, SHAPE, STATIC, seen, "float32")
    scale = stored.tensors["activation_scale"]
    assert scale.dtype == torch.float32 and torch.equal(scale, x.abs().max().reshape(1) / 127)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_are_those_of_dynamic_activations_and_four_bytes_more_are_stored(dtype):
    weight, _, seen = case()
    static, dynamic = (realize(weight, SHAPE, o, seen, dtype) for o in (STATIC, DYNAMIC))
    for name, tensor in dynamic.tensors.items():
        assert torch.equal(static.tensors[name], tensor)
    assert static.tensors.keys() == dynamic.tensors.keys() | {"activation_scale"}
    sizes = [sum(t.nbytes for t in s.tensors.values()) for s in (static, dynamic)]
    assert sizes == [stored_bytes(s.format, SHAPE) for s in (static, dynamic)]
    assert sizes[0] == sizes[1] + 4


def test_outputs_of_calibration_inputs_are_within_what_rounding_can_change():
    weight, x, seen = case()
    stored = realize(weight, SHAPE, STATIC, seen, "float32")
    scale = float(stored.tensors["activation_scale"])
    codes, rows = stored.tensors["codes"].double().view(24, 32) - 128, stored.tensors["scale"]
    rounded = codes * rows.double()
    found = reference_layer(stored, None)(x).double()
    bound = 0.5 * scale * rounded.abs().sum(1)  # of each output, all inputs rounded the worst way
    assert ((found - x.double() @ rounded.T).abs() <= 1.0001 * bound).all()


@pytest.mark.parametrize("tokens", [0, 200])
def test_inputs_never_seen_leave_each_token_its_own_scale(tokens):
    weight, x, _ = case()
    nothing = InputStatistics(torch.zeros(32, 32, dtype=torch.float64), tokens, torch.zeros(32))
    static, dynamic = (
        reference_layer(realize(weight, SHAPE, o, nothing, "float32"), None)(x)
        for o in (STATIC, DYNAMIC)
    )
    assert torch.equal(static, dynamic)


def test_scale_of_tiny_inputs_is_a_normal_number():
    scale = scale_of(torch.tensor([0.0, 1e-40]))
    assert scale == torch.finfo(torch.float32).tiny
    assert scale_of(torch.zeros(3)) == 0


def test_range_that_is_not_known_is_an_error():
    weight, _, seen = case()
    with pytest.raises(InvalidInput, match=r"a8s needs the range .*; ask for w8a8$"):
        effective_methods(STATIC, has_statistics=False)
    with pytest.raises(InvalidInput, match="ask for w8a8"):
        realize(weight, SHAPE, STATIC, None, "float32")
    with pytest.raises(ApportionError, match="largest value of each"):
        realize(weight, SHAPE, STATIC, replace(seen, peak=None), "float32")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_range_that_is_not_finite_is_refused(value):
    weight, _, seen = case()
    seen.peak[7] = value
    with pytest.raises(InvalidInput, match="calibration inputs hold values that are not finite"):
        realize(weight, SHAPE, STATIC, seen, "float32")


def test_grouped_convolutions_are_refused_with_what_is_right():
    assert refusal(STATIC, CONV) is None and refusal(DYNAMIC, GROUPED) is None
    reason = refusal(STATIC, GROUPED)
    assert reason is not None and reason.endswith("have no statistics; nearest: w8a8")


@pytest.fixture
def files(make_model, make_batch, tmp_path):
    """A model, its sites by their names, and the statistics of all inputs, read from a file."""
    model, batch = make_model("llama"), make_batch("llama")
    sites = {site.name: site for site in discover(model, batch).sites}
    watched = [site for site in sites.values() if not site.is_structure]
    sums = collect(model, watched, [batch])
    write_statistics(tmp_path / "statistics", sums)
    return model, sites, StatisticsFiles(dict.fromkeys(sums, tmp_path / "statistics"))


def test_members_of_a_group_have_the_scale_of_their_one_input(files):
    model, sites, statistics = files
    name = "model.layers.0.self_attn.q_proj+k_proj+v_proj"
    made = realize_site(model, sites[name], STATIC, statistics, "float32", 8).weights
    scales = {float(member.tensors["activation_scale"]) for member in made}
    assert scales == {float(statistics.of(name).peak.max() / 127)} and len(made) == 3


def test_narrower_layer_has_the_range_of_the_inputs_that_stay(files):
    model, sites, statistics = files
    site = sites["model.layers.0.mlp"]
    made = realize_site(model, site, parse_option("c25%+w8a8s"), statistics, "float32", 8)
    expected = []
    for name, cuts in zip(site.input_names, site.width.groups, strict=True):
        peak = statistics.of(name).peak
        left = peak[list(made.kept)] if cuts[0].side == "in" else peak
        expected += [float(left.max() / 127)] * len(cuts)
    assert [float(each.tensors["activation_scale"]) for each in made.weights] == expected
    assert len(made.kept) < site.width.units and len(set(expected)) == 2
