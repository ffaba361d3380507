"""Scales of AWQ in the norm before a site: what is stored, and that it is the same as inside."""

import copy
import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.func import functional_call

from apportion.cost_models.operators import Given, candidate_programs
from apportion.cost_models.static import resident_cost, weight_bytes
from apportion.kernels.reference import reference_weight
from apportion.spaces.apply import apply, member_weight
from apportion.spaces.artifact import TENSORS, Plan, write
from apportion.spaces.bank import Bank
from apportion.spaces.batches import call, main_tensor
from apportion.spaces.calibration import collect
from apportion.spaces.compressors.awq import ALPHAS, magnitudes, rates
from apportion.spaces.compressors.quantize import quantize
from apportion.spaces.discovery import discover
from apportion.spaces.entries import Entry, build_space
from apportion.spaces.folding import KEPT, fold, folded_rate
from apportion.spaces.grammar import parse_option
from apportion.spaces.loading import load
from apportion.spaces.parts import parts
from apportion.spaces.realization import realize_site, source_hashes
from apportion.spaces.statistics import StatisticsFiles, write_statistics
from apportion.spaces.views import parameter_at

FAMILIES = ("llama", "gemma", "opt", "gpt2")
CASES = [(family, "w4g16:awq") for family in FAMILIES]
CASES += [("llama", "s50%:magnitude+w3:awq"), ("gpt2", "2:4:sparsegpt+w4g16s:awq+o1%+r4")]

BLOCK = r"\.1\.(self_attn|attn|mlp)\."


@pytest.fixture(scope="module")
def make(make_model):
    def build(family):
        if family != "gemma":
            return make_model(family)
        from transformers import GemmaConfig, GemmaForCausalLM

        torch.manual_seed(0)
        sizes = dict(hidden_size=32, intermediate_size=64, vocab_size=96, num_hidden_layers=3)
        heads = dict(num_attention_heads=2, num_key_value_heads=1, head_dim=16)
        model = GemmaForCausalLM(GemmaConfig(**sizes, **heads)).eval().requires_grad_(False)
        for value in model.parameters():
            if value.ndim == 1:
                value.add_(0.3 * torch.randn_like(value))
        return model

    return build


class Case:
    """A model with statistics of its inputs, some of which are louder than others."""

    def __init__(self, model, batch, file):
        self.model, self.batch = model, batch
        for site in discover(model, batch).sites:
            if site.norm is not None:
                gain = parameter_at(model, site.norm.paths[0])
                gain[::7] = gain[::7] * 6 + 5 * site.norm.offset
        self.sites = {s.name: s for s in discover(model, batch).sites}
        weight_sites = [site for site in self.sites.values() if site.members]
        sums = collect(model, weight_sites, [batch])
        write_statistics(file, sums)
        self.statistics = StatisticsFiles(dict.fromkeys(sums, file))
        self.dense = copy.deepcopy(model)

    @property
    def folding(self):
        """Sites of the first block."""
        return [s for s in self.sites.values() if s.norm is not None and ".0." in s.name]

    def stored(self, site, option, dtype="float32"):
        return realize_site(self.dense, site, option, self.statistics, dtype, 4)


@pytest.fixture
def case(make, make_batch, tmp_path):
    def build(family):
        batch = make_batch("llama" if family == "gemma" else family)
        return Case(make(family), batch, tmp_path / "statistics")

    return build


@torch.no_grad()
def output_of(model, batch):
    return main_tensor(call(model, batch))


def vectors_of(model, site):
    return [parameter_at(model, path) for path in site.norm.paths]


@settings(deadline=None, max_examples=25)
@given(
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.sampled_from([0, 1]),
    st.floats(0, 8),
    st.integers(0, 10**6),
)
def test_fold_tells_what_the_rounded_gain_multiplies_by(dtype, offset, spread, seed):
    generator = torch.Generator().manual_seed(seed)
    gain, bias = torch.randn(2, 64, generator=generator).to(dtype)
    gain[0] = -offset
    wanted = (spread * (torch.rand(64, generator=generator) - 0.5)).exp().double()
    (new, shifted), rate = fold([gain, bias], offset, wanted)
    assert new.dtype == shifted.dtype == dtype and rate.dtype == torch.float32
    exact = (offset + new.double()) / (offset + gain.double())
    torch.testing.assert_close(rate[1:].double(), exact[1:], rtol=1e-6, atol=0)
    assert new[0] == -offset and rate[0] == wanted.float()[0]
    kept = (rate / wanted - 1).abs() > KEPT
    assert torch.equal(new[kept], gain[kept]) and (rate[kept] == 1).all()
    step = torch.finfo(dtype).eps * shifted.double().abs() + torch.finfo(dtype).tiny
    assert ((shifted.double() - bias.double() * rate).abs() <= step).all()
    torch.testing.assert_close(folded_rate([gain, bias], [new, shifted], offset)[1:], rate[1:])


def test_fold_keeps_a_gain_that_rounding_would_lose():
    # 1 + gain is 2^-7; half of it would be 1 + (1/256 - 1), and bfloat16 ends at steps of 2^-8.
    gain = torch.tensor([-1 + 2**-8, 0.5]).bfloat16()
    (new,), rate = fold([gain], 1, torch.tensor([0.3, 0.5], dtype=torch.float64))
    assert torch.equal(new, torch.tensor([-1 + 2**-8, -0.25]).bfloat16())
    assert torch.equal(rate, torch.tensor([1.0, 0.5]))


def test_folded_rate_without_a_gain_is_that_of_the_bias():
    old = [torch.tensor([0.0, 0.0, 2.0]), torch.tensor([3.0, 0.0, 0.0])]
    new = [torch.tensor([0.0, 0.0, 1.0]), torch.tensor([6.0, 0.0, 0.0])]
    assert folded_rate(old, new, 0).tolist() == [2, 1, 0.5]


@pytest.mark.parametrize("family", FAMILIES)
def test_folded_norm_gives_what_a_multiplication_inside_gives(case, family):
    found = case(family)
    # Gemma's norms multiply in float32, whatever they are given.
    precision = 1e-6 if family == "gemma" else 1e-13
    model, x = copy.deepcopy(found.dense).double(), torch.randn(6, 32, dtype=torch.float64)
    option = parse_option("w4g16:awq")
    for site in found.folding:
        part, old = model.get_submodule(site.norm.module), vectors_of(model, site)
        moment = found.statistics.of(site.name).second_moment
        into = rates(magnitudes(moment.diagonal()), 0.5)
        new, _ = fold(old, site.norm.offset, into)
        assert all(vector.dtype == torch.float64 for vector in new)
        exact = (new[0] + site.norm.offset) / (old[0] + site.norm.offset)
        scaled = functional_call(part, dict(zip(site.norm.vectors, new, strict=True)), x)
        matrices = map(reference_weight, found.stored(site, option).weights)
        for weight in (each.double() for each in matrices):
            torch.testing.assert_close(
                scaled @ weight.T, (part(x) * exact) @ weight.T, rtol=precision, atol=precision
            )


@pytest.mark.parametrize("family, text", CASES)
def test_folded_model_is_the_dense_one_with_the_scales_in_its_weights(case, family, text):
    found, option = case(family), parse_option(text)
    inside, names, spread = copy.deepcopy(found.dense), {}, 1.0
    for site in found.folding:
        stored = found.stored(site, option)
        assert not any(each.format.input_scaled for each in stored.weights)
        rate = folded_rate(vectors_of(found.dense, site), stored.norm, site.norm.offset)
        spread = max(spread, float(rate.max() / rate.min()))
        for member, weight in zip(site.members, stored.weights, strict=True):
            member_weight(inside, member).copy_(reference_weight(weight) * rate)
        names[site.name] = {text: "linear.f32"}
    space = build_space(list(found.sites.values()), [Entry(tuple(names), ("dense", text))])
    apply(found.model, space, dict.fromkeys(names, text), found.stored, names)
    expected = output_of(inside, found.batch)
    error = (output_of(found.model, found.batch) - expected).norm() / expected.norm()
    assert error < 1e-5 and spread > 1.2
    assert (expected - output_of(found.dense, found.batch)).norm() / expected.norm() > 1e-4


@pytest.mark.parametrize("text", ["w3g16:awq", "w4:awq", "w4g32s:awq"])
def test_members_share_the_scales_of_least_error_of_all_of_them(case, text):
    found, option = case("llama"), parse_option(text)
    site = found.folding[0]
    stored = found.stored(site, option)
    moment = found.statistics.of(site.name).second_moment
    weights = [member_weight(found.dense, member) for member in site.members]
    old = vectors_of(found.dense, site)

    def lost(alpha):
        _, rate = fold(old, 0, rates(magnitudes(moment.diagonal()), alpha))
        met = moment.diagonal() * rate.double().square()
        errors = []
        for weight in weights:
            made = quantize(weight / rate, option.bits, option.group, option.symmetric, None, met)
            missing = (weight - made.values(option.bits) * rate).double()
            errors.append(((missing @ moment) * missing).sum())
        return float(sum(errors))

    rate = folded_rate(old, stored.norm, 0)
    parts = [
        (weight - reference_weight(each) * rate).double()
        for weight, each in zip(weights, stored.weights, strict=True)
    ]
    error = float(sum(((part @ moment) * part).sum() for part in parts))
    assert error == pytest.approx(min(map(lost, ALPHAS)), rel=1e-5)
    assert error < 0.95 * lost(0)


def test_bfloat16_norm_loses_nothing_by_its_rounding(case):
    """What the rounded gain multiplies by is what is undone, so the error is that of float32."""
    found, errors = case("llama"), {}
    site, option = found.folding[0], parse_option("w3g16:awq")
    moment = found.statistics.of(site.name).second_moment
    for dtype in (torch.float32, torch.bfloat16):
        for vector in vectors_of(found.dense, site):
            vector.data = vector.data.bfloat16().to(dtype)
        old, stored = vectors_of(found.dense, site), found.stored(site, option)
        assert stored.norm[0].dtype == dtype
        rate = folded_rate(old, stored.norm, 0)
        for member, each in zip(site.members, stored.weights, strict=True):
            part = (member_weight(found.dense, member) - reference_weight(each) * rate).double()
            errors[dtype] = errors.get(dtype, 0) + float(((part @ moment) * part).sum())
    assert errors[torch.bfloat16] == pytest.approx(errors[torch.float32], rel=0.03)


def test_bank_gives_the_vectors_of_a_norm_to_the_bit(case, tmp_path):
    found, bank = case("gpt2"), Bank(tmp_path / "bank")
    stored = found.stored(found.folding[0], parse_option("w4g16:awq"))
    bank.put("a1", stored)
    read = bank.get("a1")
    assert len(stored.norm) == 2 and all(map(torch.equal, read.norm, stored.norm))
    assert read.weights[0].format == stored.weights[0].format


def test_keys_change_where_scales_are_folded_and_nowhere_else(case):
    found = case("llama")
    site = found.folding[0]
    options = list(map(parse_option, ["w4g16", "w4g16:gptq", "w4g16:awq", "bf16"]))
    folded = source_hashes(found.dense, site, options)
    inside = source_hashes(found.dense, replace(site, norm=None), options)
    assert {text for text in folded if folded[text] != inside[text]} == {"w4g16:awq"}
    vectors_of(found.dense, site)[0][0] += 1
    moved = source_hashes(found.dense, site, options)
    assert {text for text in folded if folded[text] != moved[text]} == {"w4g16:awq"}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("text", ["w4g32:awq", "s50%+w3:awq+o1%"])
def test_folded_scales_are_loaded_as_they_were_stored_and_cost_nothing(
    case, tmp_path, family, text
):
    found = case(family)
    names = {name: {text: "linear.f32"} for name in found.sites if re.search(BLOCK, name)}
    space = build_space(list(found.sites.values()), [Entry(tuple(names), ("dense", text))])
    plan = Plan(space, dict.fromkeys(names, text), found.stored, names)
    source = {"kind": "hf", "source": "there", "revision": "1", "dtype": "float32"}
    write(tmp_path / "artifact", found.model, plan, source, {}, found.model.config.save_pretrained)
    apply(found.model, space, plan.configuration, plan.stored, plan.implementations)
    loaded = load(tmp_path / "artifact")
    assert torch.equal(output_of(loaded, found.batch), output_of(found.model, found.batch))
    tensors = load_file(tmp_path / "artifact" / TENSORS)
    scaled = {n.partition(".packed.")[0] for n in tensors if n.endswith(".input_scale")}
    assert scaled == {
        m.module for name in names for m in found.sites[name].members if not found.sites[name].norm
    }
    cost, config = weight_bytes(found.dense, space, 4), space.config(plan.configuration)
    rows = [cost.rows[place, option] for place, option in enumerate(config)]
    assert cost.base + sum(rows) == sum(tensor.nbytes for tensor in tensors.values())


def test_operators_of_folded_scales_are_those_of_the_plain_format(case):
    found = case("llama")
    site, given = found.folding[0], Given((1, 1, 32), "float32")
    scaled, plain = (
        candidate_programs(found.dense, site, parse_option(text), [given], 1, 4)
        for text in ("w4g32:awq", "w4g32")
    )
    assert [[o.key for o in program] for program in scaled] == [
        [o.key for o in program] for program in plain
    ]
    option = parse_option("w4g32:awq")
    assert parts(replace(site, norm=None), option, "float32")[0].formats[0].input_scaled


def test_resident_bytes_tell_folded_sites_from_others_of_the_same_shape(case):
    found = case("llama")
    site = found.folding[0]
    name = site.name.replace(".0.", ".1.")
    other = replace(found.sites[name], norm=None)
    assert [m.shape for m in site.members] == [m.shape for m in other.members]
    space = build_space([site, other], [Entry(("*",), ("dense", "w8:awq"))])
    names = {name: {"w8:awq": "int8pack.bf16"} for name in space.names}
    folded, inside = resident_cost(found.dense, space, names).rows[:, 1]
    assert inside - folded == 2 * 32 * len(site.members)
