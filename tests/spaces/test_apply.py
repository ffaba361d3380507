"""Applying: a configuration in a live model equals what it says it is, cache included."""

import copy

import pytest
import torch
from torch import nn

from apportion.kernels.reference import reference_weight
from apportion.spaces.apply import Dropped, apply, bias_of, member_weight
from apportion.spaces.batches import call, main_tensor
from apportion.spaces.grammar import parse_option

LANGUAGE = ("llama", "qwen3", "opt", "gpt2")
BLOCKS = {"llama": "model.layers", "qwen3": "model.layers", "opt": "model.decoder.layers"}
BLOCKS |= {"gpt2": "transformer.h", "bert": "bert.encoder.layer", "conv": "blocks"}
ATTENTION = {"gpt2": "attn", "bert": "attention"}
# The last layer of a residual branch: with zeros in it the branch adds nothing.
LAST = {"llama": "o_proj", "qwen3": "o_proj", "opt": "out_proj", "gpt2": "c_proj"}


def block(family, place):
    return f"{BLOCKS[family]}.{place}"


def attention(family, place):
    return f"{block(family, place)}.{ATTENTION.get(family, 'self_attn')}"


@pytest.fixture
def applied(make_model, full_space, make_plan):
    """family, configuration -> a model with it."""

    def build(family, configuration):
        model, space = make_model(family), full_space(family)
        plan = make_plan(copy.deepcopy(model), space, configuration)
        apply(model, space, plan.configuration, plan.stored, plan.implementations)
        return model

    return build


@torch.no_grad()
def output_of(model, batch):
    return main_tensor(call(model, batch))


def silence(model, layer):
    for parameter in model.get_submodule(layer).parameters():
        parameter.zero_()


@pytest.mark.parametrize("family", LANGUAGE)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_apply_dropped_attention_equals_zeros_in_its_last_layer(
    applied, make_model, make_batch, family, place
):
    dense, batch = make_model(family), make_batch(family)
    before = output_of(dense, batch)
    silence(dense, f"{attention(family, place)}.{LAST[family]}")
    expected = output_of(dense, batch)
    assert not torch.allclose(before, expected, atol=1e-3)
    model = applied(family, {attention(family, place): "drop"})
    torch.testing.assert_close(output_of(model, batch), expected)


@pytest.mark.parametrize(
    "family, branches",
    [
        ("llama", ("self_attn.o_proj", "mlp.down_proj")),
        ("qwen3", ("self_attn.o_proj", "mlp.down_proj")),
        ("opt", ("self_attn.out_proj", "fc2")),
        ("gpt2", ("attn.c_proj", "mlp.c_proj")),
        ("conv", ("second",)),
    ],
)
def test_apply_dropped_block_equals_zeros_in_its_branches(
    applied, make_model, make_batch, family, branches
):
    dense, batch = make_model(family), make_batch(family)
    for branch in branches:
        silence(dense, f"{block(family, 1)}.{branch}")
    model = applied(family, {block(family, 1): "drop"})
    torch.testing.assert_close(output_of(model, batch), output_of(dense, batch))


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_apply_dropped_mlp_equals_zeros_in_its_last_layer(applied, make_model, make_batch, family):
    dense, batch = make_model(family), make_batch(family)
    last = "c_proj" if family == "gpt2" else "down_proj"
    silence(dense, f"{block(family, 0)}.mlp.{last}")
    model = applied(family, {f"{block(family, 0)}.mlp": "drop"})
    torch.testing.assert_close(output_of(model, batch), output_of(dense, batch))


@pytest.mark.parametrize("family", ["opt", "gpt2"])
def test_apply_drop_for_a_constant_equals_it_as_the_bias_of_silent_weights(
    applied, make_model, make_batch, full_space, make_plan, family
):
    dense, space, name = make_model(family), full_space(family), attention(family, 1)
    site, batch = space.sites[space.index(name)], make_batch(family)
    stored = make_plan(dense, space, {}).stored(site, parse_option("drop:mean"))
    silence(dense, f"{name}.{LAST[family]}")
    dense.get_submodule(f"{name}.{LAST[family]}").bias.copy_(stored.constant)
    model = applied(family, {name: "drop:mean"})
    torch.testing.assert_close(output_of(model, batch), output_of(dense, batch))


def test_apply_dropped_attention_that_adds_its_input_hands_it_on(
    applied, make_model, make_batch, monkeypatch
):
    dense, batch = make_model("bert"), make_batch("bert")
    inner = dense.get_submodule(attention("bert", 1))
    monkeypatch.setattr(inner, "forward", lambda hidden, *args, **keywords: (hidden, None))
    model = applied("bert", {attention("bert", 1): "drop"})
    torch.testing.assert_close(output_of(model, batch), output_of(dense, batch))


def test_apply_dropped_last_block_of_bert_equals_a_shorter_model(applied, make_model, make_batch):
    dense, batch = make_model("bert"), make_batch("bert")
    del dense.bert.encoder.layer[2]
    model = applied("bert", {block("bert", 2): "drop"})
    torch.testing.assert_close(output_of(model, batch), output_of(dense, batch))


CASES = [(f, o) for f in (*LANGUAGE, "bert") for o in ("w4g32", "w4g16s", "w8", "r50%", "s50%")]
CASES += [("conv", option) for option in ("w4g16s", "w8", "s50%")]
WRITTEN = ("mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "recurrent", "vision", "encoder")
CASES += [(family, option) for family in WRITTEN for option in ("w4g16s", "r50%", "s50%+w4g32")]


@pytest.mark.parametrize("family, option", CASES)
def test_apply_option_everywhere_equals_its_reference_weights(
    applied, make_model, full_space, make_plan, make_batch, family, option
):
    dense, space, batch = make_model(family), full_space(family), make_batch(family)
    having = [s for s, row in zip(space.sites, space.texts, strict=True) if option in row]
    plan = make_plan(copy.deepcopy(dense), space, {})
    assert having
    for site in having:
        stored = plan.stored(site, parse_option(option)).weights
        for member, weight in zip(site.members, stored, strict=True):
            member_weight(dense, member).copy_(reference_weight(weight))
    model = applied(family, {site.name: option for site in having})
    torch.testing.assert_close(
        output_of(model, batch), output_of(dense, batch), atol=1e-4, rtol=1e-3
    )


@pytest.mark.parametrize("family", WRITTEN)
def test_apply_written_back_equals_weights_replaced_by_hand(
    applied, make_model, full_space, make_plan, make_batch, family
):
    dense, space, batch = make_model(family), full_space(family), make_batch(family)
    plan = make_plan(copy.deepcopy(dense), space, {})
    sites = [site for site in space.sites if site.written_back]
    parameters = dict(dense.named_parameters())
    for site in sites:
        for member, weight in zip(
            site.members, plan.stored(site, parse_option("w4g16s")).weights, strict=True
        ):
            parameter = parameters[f"{member.module}.{member.parameter}"]
            place = parameter if member.index is None else parameter[member.index]
            matrix = reference_weight(weight)
            place.copy_((matrix.T if member.transposed else matrix).reshape(place.shape))
    before = output_of(make_model(family), batch)
    model = applied(family, {site.name: "w4g16s" for site in sites})
    assert torch.equal(output_of(model, batch), output_of(dense, batch))
    assert not torch.allclose(output_of(model, batch), before, atol=1e-4)


@pytest.mark.parametrize("family", WRITTEN)
def test_apply_written_back_leaves_shared_parameters(
    make_model, full_space, make_plan, make_batch, family
):
    model, space, batch = make_model(family), full_space(family), make_batch(family)
    before = output_of(model, batch)
    sites = [site.name for site in space.sites if site.written_back]
    plan = make_plan(model, space, dict.fromkeys(sites, "w4g16s"))
    shared = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    apply(shared, space, plan.configuration, plan.stored, plan.implementations)
    assert not torch.equal(output_of(shared, batch), before)
    assert torch.equal(output_of(model, batch), before)


@pytest.mark.parametrize("family", [*LANGUAGE, *WRITTEN, "bert", "conv"])
def test_apply_dense_leaves_the_model_untouched(applied, make_model, make_batch, family):
    model, dense, batch = applied(family, {}), make_model(family), make_batch(family)
    assert [type(m) for m in model.modules()] == [type(m) for m in dense.modules()]
    assert torch.equal(output_of(model, batch), output_of(dense, batch))


def test_apply_all_dropped_leaves_embedding_norm_and_head(applied, make_model, make_batch):
    dense, batch = make_model("llama"), make_batch("llama")
    model = applied("llama", {block("llama", place): "drop" for place in range(3)})
    hidden = dense.model.norm(dense.model.embed_tokens(batch["input_ids"]))
    torch.testing.assert_close(output_of(model, batch), dense.lm_head(hidden))


def test_apply_option_under_a_dropped_block_is_void(applied, make_batch):
    site = "model.layers.1.mlp.down_proj"
    model = applied("llama", {block("llama", 1): "drop", site: "w4g32"})
    assert isinstance(model.get_submodule(block("llama", 1)), Dropped)
    both = {block("llama", 1): "drop", f"{block('llama', 1)}.mlp": "drop"}
    batch = make_batch("llama")
    assert torch.equal(output_of(model, batch), output_of(applied("llama", both), batch))


DROPS = {
    "attention of layer 0": lambda family: [attention(family, 0)],
    "attention in the middle": lambda family: [attention(family, 1)],
    "block 0": lambda family: [block(family, 0)],
    "block 1": lambda family: [block(family, 1)],
    "last block": lambda family: [block(family, 2)],
    "attention 0 and block 1": lambda family: [attention(family, 0), block(family, 1)],
    "all attention": lambda family: [attention(family, place) for place in range(3)],
}


@pytest.mark.parametrize("family", LANGUAGE)
@pytest.mark.parametrize("drops", DROPS)
def test_apply_drop_generates_the_same_with_and_without_cache(applied, make_batch, family, drops):
    model = applied(family, dict.fromkeys(DROPS[drops](family), "drop"))
    ids = make_batch(family, 5)["input_ids"]
    settings = dict(max_new_tokens=8, min_new_tokens=8, do_sample=False, output_scores=True)
    settings |= dict(return_dict_in_generate=True, pad_token_id=0)
    with_cache = model.generate(ids, attention_mask=ids > 0, use_cache=True, **settings)
    without = model.generate(ids, attention_mask=ids > 0, use_cache=False, **settings)
    assert torch.equal(with_cache.sequences, without.sequences)
    torch.testing.assert_close(
        torch.stack(with_cache.scores), torch.stack(without.scores), atol=1e-4, rtol=1e-3
    )


@pytest.mark.parametrize("family", LANGUAGE)
@pytest.mark.parametrize("drops", DROPS)
def test_apply_drop_keeps_the_length_of_the_cache(applied, make_batch, family, drops):
    model = applied(family, dict.fromkeys(DROPS[drops](family), "drop"))
    ids = make_batch(family, 9)["input_ids"]
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        first = model(ids[:, :5], use_cache=True)
        cache = first.past_key_values
        assert cache.get_seq_length() == 5
        second = model(ids[:, 5:], past_key_values=cache, use_cache=True)
    assert cache.get_seq_length() == 9
    joined = torch.cat([first.logits, second.logits], 1)
    torch.testing.assert_close(joined, whole, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("family", LANGUAGE)
def test_apply_drop_generates_the_same_with_left_padding(applied, make_batch, family):
    model = applied(family, {attention(family, 0): "drop", block(family, 1): "drop"})
    ids = make_batch(family, 5)["input_ids"]
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), ids], 1)
    settings = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0)
    plain = model.generate(ids, attention_mask=ids > 0, **settings)
    shifted = model.generate(padded, attention_mask=padded > 0, **settings)
    assert torch.equal(shifted[:, 3:], plain)


def test_apply_drop_of_convolution_blocks_can_be_copied(applied, make_batch):
    model = applied("conv", {"blocks.0": "drop", "blocks.1.second": "w8"})
    batch = make_batch("conv")
    assert torch.equal(output_of(copy.deepcopy(model), batch), output_of(model, batch))


def test_dropped_keeps_the_plain_attributes_that_models_read(applied, make_model):
    model, name = applied("qwen3", {block("qwen3", 1): "drop"}), block("qwen3", 1)
    dense = make_model("qwen3").get_submodule(name)
    assert model.get_submodule(name).hidden_size == dense.hidden_size


def test_member_weight_of_a_convolution_is_its_matrix(make_model, full_space):
    model, space = make_model("conv"), full_space("conv")
    member = space.sites[space.index("blocks.1.first")].members[0]
    weight = model.get_submodule(member.module).weight
    assert torch.equal(member_weight(model, member), weight.reshape(16, 4 * 9))


def test_bias_of_a_layer_without_one_is_none(make_model):
    model = make_model("llama")
    assert bias_of(model, "lm_head") is None
    assert bias_of(nn.Sequential(nn.Linear(2, 3)), "0").shape == (3,)
