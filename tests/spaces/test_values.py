"""Value dimensions: which rows of attention are its values, and attention with fewer of them.

What runs, is stored and is loaded of fewer query-key dimensions is tried beside it.
"""

import copy
from collections.abc import Callable

import pytest
import torch
import transformers
from torch import nn
from torch.nn.functional import layer_norm, rms_norm, scaled_dot_product_attention

from apportion.cost_models.random_weights import random_weights
from apportion.cost_models.rows import shape_of
from apportion.cost_models.static import resident_cost, weight_bytes
from apportion.errors import InvalidInput
from apportion.hashing import tensors_hash
from apportion.kernels.reference import reference_weight
from apportion.kernels.registry import serving
from apportion.spaces.apply import apply, bias_of
from apportion.spaces.artifact import Plan, contents, write
from apportion.spaces.bank import Bank
from apportion.spaces.batches import call, frozen, main_tensor
from apportion.spaces.calibration import collect
from apportion.spaces.discovery import discover
from apportion.spaces.entries import Entry, build_space
from apportion.spaces.grammar import parse_option
from apportion.spaces.loading import load
from apportion.spaces.parts import parts, treated_site
from apportion.spaces.realization import realize_site, source_hashes
from apportion.spaces.statistics import StatisticsFiles, write_statistics
from apportion.spaces.views import matrix_of, parameter_at
from apportion.workers.realized import RealizedStore

HIDDEN, WORDS = 32, 96
SIZES = dict(hidden_size=HIDDEN, vocab_size=WORDS, num_hidden_layers=2, intermediate_size=40)
HEADS = SIZES | dict(num_attention_heads=4)
GROUPED = HEADS | dict(num_key_value_heads=2)
OPTIONS = ("v75%", "v50%", "v50%:svd", "v50%+w8", "v75%+w4g8:gptq", "v50%+r50%", "v50%+w8a8")
QUERY_KEYS = ("q75%", "q50%", "q50%:svd+w8", "q75%+w4g8:gptq", "q50%+w8a8s")


def of(name, task="ForCausalLM", **settings):
    config = getattr(transformers, f"{name}Config")(**settings)
    return lambda: getattr(transformers, name + task)(config)


def gpt2():
    sizes = dict(n_embd=HIDDEN, n_layer=2, n_head=4, n_positions=64, vocab_size=WORDS)
    config = transformers.GPT2Config(**sizes, bos_token_id=1, eos_token_id=2)
    return transformers.GPT2LMHeadModel(config)


def opt():
    sizes = dict(ffn_dim=40, word_embed_proj_dim=HIDDEN, max_position_embeddings=64)
    return of("OPT", **HEADS, **sizes)()


PHI3 = dict(pad_token_id=0, eos_token_id=2)
# Name -> the model, the end of the value layer's name, and which of its stacks of 8 are values.
MODELS: dict[str, tuple[Callable[[], nn.Module], str, tuple[int, ...]]] = {
    "llama": (of("Llama", **GROUPED), "v_proj", ()),
    "biased": (of("Llama", **GROUPED, attention_bias=True), "v_proj", ()),
    "one key-value head": (of("Llama", **HEADS, num_key_value_heads=1), "v_proj", ()),
    "qwen2": (of("Qwen2", **GROUPED), "v_proj", ()),
    "qwen3": (of("Qwen3", **GROUPED, head_dim=8), "v_proj", ()),
    "gemma": (of("Gemma2", **GROUPED, head_dim=8, sliding_window=4), "v_proj", ()),
    "phi3": (of("Phi3", **HEADS, **PHI3), "qkv_proj", (8, 9, 10, 11)),
    "grouped phi3": (of("Phi3", **GROUPED, **PHI3), "qkv_proj", (6, 7)),
    "neox": (of("GPTNeoX", **HEADS), "query_key_value", (2, 5, 8, 11)),
    "opt": (opt, "v_proj", ()),
    "gpt2": (gpt2, "c_attn", (8, 9, 10, 11)),
    "bert": (of("Bert", "ForMaskedLM", **HEADS), "value", ()),
    "vit": (
        of("ViT", "ForImageClassification", **HEADS, image_size=16, patch_size=4),
        "v_proj",
        (),
    ),
}


def made(build):
    """Random weights that no norm or bias is neutral among."""
    torch.manual_seed(0)
    model = frozen(build())
    for path, tensor in model.state_dict().items():
        if tensor.ndim == 1:
            tensor.add_(0.1 * torch.randn_like(tensor))
        elif "embed" not in path:
            tensor.mul_(4)
    return model


def batch_of(name, seed=1, rows=2):
    generator = torch.Generator().manual_seed(seed)
    if name == "vit":
        return torch.randn(rows, 3, 16, 16, generator=generator)
    return {"input_ids": torch.randint(3, WORDS, (rows, 9), generator=generator)}


def attention_of(found):
    return next(site for site in found.sites if site.kind == "attention")


@pytest.mark.parametrize("name", MODELS)
def test_values_are_found(name):
    build, leaf, narrowing = MODELS[name]
    site = attention_of(discover(made(build), batch_of(name)))
    assert site.values is not None and site.values.units == 8
    cuts = {cut.side: cut for cut in site.values.cuts}
    assert cuts["out"].member.module.endswith(leaf)
    assert cuts["out"].narrowing == narrowing
    assert cuts["in"].stacks == 4
    assert len(site.values.cuts) == sum(len(group) for group in site.groups)


class Attention(nn.Module):
    """Four heads `[batch, tokens, 32]` -> the same; `treated` is done to the values or after."""

    def __init__(self, values=lambda v: v, outputs=lambda o, x: o, bias=True) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(HIDDEN, HIDDEN, bias) for _ in range(4))
        self.treated, self.outputs = values, outputs

    def heads(self, layer, x):
        return layer(x).unflatten(-1, (4, 8)).transpose(1, 2)

    def forward(self, x):
        q, k, v = (self.heads(layer, x) for layer in (self.q, self.k, self.v))
        mixed = scaled_dot_product_attention(q, k, self.treated(v), is_causal=True)
        return self.o(self.outputs(mixed, x).transpose(1, 2).flatten(2))


class Sinks(Attention):
    """A share of the attention goes nowhere, so its weights sum to less than 1."""

    def forward(self, x):
        q, k, v = (self.heads(layer, x) for layer in (self.q, self.k, self.v))
        scores = q @ k.transpose(-1, -2)
        weights = torch.cat([scores, torch.ones_like(scores[..., :1])], -1).softmax(-1)
        return self.o((weights[..., :-1] @ v).transpose(1, 2).flatten(2))


class Shared(Attention):
    """The keys are the values too."""

    def __init__(self) -> None:
        super().__init__()
        del self.k

    def forward(self, x):
        q, v = self.heads(self.q, x), self.heads(self.v, x)
        return self.o(scaled_dot_product_attention(q, v, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, attention) -> None:
        super().__init__()
        self.attention = attention()

    def forward(self, x):
        return x + self.attention(x)


def two(attention):
    return lambda: nn.Sequential(Block(attention), Block(attention))


def unweighted(v):
    return rms_norm(v, (8,))


REFUSED = {
    "normed": two(lambda: Attention(lambda v: layer_norm(v, (8,)))),
    "normed by length": two(lambda: Attention(unweighted, bias=False)),
    "gated": two(lambda: Attention(outputs=lambda o, x: o * x.mean(-1).sigmoid()[:, None, :, None]
                                   * torch.linspace(0.5, 1, 8))),
    "activated": two(lambda: Attention(torch.tanh)),
    "sinks": two(Sinks),
    "shared": two(Shared),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_done_to_values_beside_averaging_refuses_them(name):
    found = discover(made(REFUSED[name]), torch.randn(2, 6, HIDDEN))
    site = attention_of(found)
    assert site.values is None
    assert "reads is no plain average of what one layer gives" in found.fixed_values[site.name]
    with pytest.raises(InvalidInput, match="v50%.* is for none of the sites.*vP% for attention"):
        build_space(found.sites, [Entry(("attention:*",), ("keep", "drop", "v50%"))])


def test_plain_attention_of_the_same_code_has_values():
    assert attention_of(discover(made(two(Attention)), torch.randn(2, 6, HIDDEN))).values


def test_an_mlp_has_no_values():
    found = discover(made(MODELS["llama"][0]), batch_of("llama"))
    assert not any(site.values for site in found.sites if site.kind != "attention")


class Treated:
    """A model's attention under its options, fitted on calibration's statistics."""

    def __init__(self, name, folder):
        self.name, self.model = name, made(MODELS[name][0])
        options = ("keep", "drop", *OPTIONS, *QUERY_KEYS)
        entries = [Entry(("attention:*",), options, skip_unfit=True)]
        self.space = build_space(discover(self.model, batch_of(name)).sites, entries, 2)
        sums = collect(self.model, self.space.input_sites, [batch_of(name, 3, 40)])
        write_statistics(folder / "seen", sums)
        names = [name for site in self.space.sites for name in site.input_names]
        self.statistics = StatisticsFiles(dict.fromkeys(names, folder / "seen"))
        self.bank = Bank(folder / "bank")
        self.site = self.space.sites[0]

    def stored(self, site, option):
        key = tensors_hash({}) + f"{site.name}{option}".replace("%", "p").replace(":", "")
        if not self.bank.has(key):
            made = realize_site(self.model, site, option, self.statistics, "float32", 2)
            self.bank.put(key, made)
        return self.bank.get(key)

    def plan(self, text, stored=None):
        named = {
            site.name: {
                str(option): serving(part.formats[0], part.shapes, "cpu")[0].name
                for option in row
                if option.narrows
                for part in parts(site, option, "float32", 2)
            }
            for site, row in zip(self.space.sites, self.space.options, strict=True)
        }
        chosen = self.space.canonical({site.name: text for site in self.space.sites})
        return Plan(self.space, chosen, stored or self.stored, named)

    def applied(self, text):
        plan, model = self.plan(text), copy.deepcopy(self.model)
        apply(model, self.space, plan.configuration, plan.stored, plan.implementations)
        return model

    def output(self, model):
        with torch.no_grad():
            return main_tensor(call(model, batch_of(self.name, 2)))


@pytest.fixture(scope="module")
def treated(tmp_path_factory):
    known: dict[str, Treated] = {}

    def of_name(name):
        if name not in known:
            known[name] = Treated(name, tmp_path_factory.mktemp("values"))
        return known[name]

    return of_name


def with_zeros(case, text):
    """The dense model with zeros in the rows and columns of dimensions that are left out."""
    model, option = copy.deepcopy(case.model), parse_option(text)
    for site in case.space.sites:
        stored = case.stored(site, option)
        width = treated_site(site, option).width
        for cut, weight, bias in zip(width.cuts, stored.weights, stored.biases, strict=True):
            dense = matrix_of(parameter_at(model, cut.member.parameter_path), cut.member)
            full, offset = torch.zeros_like(dense), bias_of(model, cut.member.module)
            places = cut.places(stored.kept, width.units)
            if cut.side == "out":
                full[places] = reference_weight(weight)
                if offset is not None:
                    offset.zero_()[places] = bias
            elif cut.side == "in":
                full[:, places] = reference_weight(weight)
                if offset is not None:
                    offset.copy_(bias)
            else:
                full.copy_(reference_weight(weight))
            dense.copy_(full)
    return model


@pytest.mark.parametrize(
    "text",
    ["v75%", "v50%:svd", "v50%+w8", "v75%+w4g8:gptq", "q75%", "q50%:svd+w8", "q75%+w4g8:gptq"],
)
@pytest.mark.parametrize("name", MODELS)
def test_what_runs_is_the_dense_model_with_zeros(treated, name, text):
    case = treated(name)
    if text.startswith("q") and case.site.query_keys is None:
        pytest.skip("its queries and keys are normed")
    expected, found = case.output(with_zeros(case, text)), case.output(case.applied(text))
    dense = case.output(case.model)
    assert (found - expected).norm() <= 1e-5 * expected.norm()
    assert (dense - expected).norm() >= 1e-3 * dense.norm()


@pytest.mark.parametrize("text", [*OPTIONS, *QUERY_KEYS])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_evaluators_sub_block_gives_what_the_applied_one_does(treated, name, text):
    case = treated(name)
    option = parse_option(text)
    assert case.stored(case.site, option).weights
    key = next(p.stem for p in case.bank.folder.rglob(
        f"*{case.site.name}{text}.safetensors".replace("%", "p").replace(":", "")))  # fmt: skip
    store = RealizedStore(case.bank, {case.site.name: {text: key}}, 1 << 20)
    replaced = copy.deepcopy(case.model)
    replaced.set_submodule(case.site.name, store.replacement(case.site, text, case.model))
    applied = case.applied("keep")
    applied.set_submodule(case.site.name, case.applied(text).get_submodule(case.site.name))
    torch.testing.assert_close(case.output(replaced), case.output(applied), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("text", ["v75%", "v50%+w8", "v50%+r50%", "q75%", "q50%:svd+w8"])
@pytest.mark.parametrize("name", ["biased", "gpt2", "grouped phi3", "opt", "bert"])
def test_loaded_folder_is_bit_equal_and_as_large_as_promised(treated, tmp_path, name, text):
    case = treated(name)
    plan = case.plan(text)
    source = {"kind": "python", "source": "there", "revision": "1", "dtype": "float32"}
    write(tmp_path / "written", case.model, plan, source, {})
    loaded = load(tmp_path / "written", model=MODELS[name][0])
    assert torch.equal(case.output(loaded), case.output(case.applied(text)))
    tensors, _ = contents(case.model, plan)
    cost, shape = weight_bytes(case.model, case.space, 2), shape_of(case.space)
    config = case.space.config(plan.configuration)
    promised = cost.base + shape.total(cost.rows, config)
    assert promised == sum(tensor.nbytes for tensor in tensors.values())
    drawn, _ = contents(case.model, case.plan(text, random_weights(case.space, "float32", 2)))
    assert {n: (t.shape, t.dtype) for n, t in drawn.items()} == {
        n: (t.shape, t.dtype) for n, t in tensors.items()
    }
    dense = cost.base + shape.total(cost.rows, [0] * len(config))
    assert promised < dense
    resident = resident_cost(case.model, case.space, plan.implementations, 2)
    assert shape.total(resident.rows, config) < shape.total(resident.rows, [0] * len(config))


@pytest.mark.parametrize("texts", [("v75%", "v50%"), ("q75%", "q50%")])
@pytest.mark.parametrize("name", ["llama", "biased", "gpt2"])
def test_more_dimensions_lose_less(treated, name, texts):
    case = treated(name)
    dense = case.output(case.model)
    losses = [float((case.output(case.applied(text)) - dense).norm()) for text in texts]
    assert losses[0] < losses[1]


def test_entries_are_named_by_biases_where_they_are_fitted_to_them(treated):
    model, site = copy.deepcopy(treated("biased").model), treated("biased").site
    options = [parse_option(text) for text in ("v50%", "c50%", "q50%")]
    before = source_hashes(model, site, options)
    bias_of(model, f"{site.name}.v_proj").add_(1)
    after = source_hashes(model, site, options)
    assert before["v50%"] != after["v50%"] and before["c50%"] == after["c50%"]
    assert len(set(before.values())) == 3 and before["q50%"] != after["q50%"]


def test_bank_gives_back_the_biases_and_notices_other_ones(treated):
    case, option = treated("biased"), parse_option("v50%")
    fitted = realize_site(case.model, case.site, option, case.statistics, "float32", 2)
    stored = case.stored(case.site, option)
    for one, other in zip(stored.biases, fitted.biases, strict=True):
        assert torch.equal(one, other)
    assert stored.kept == (0, 1, 2, 3)
    llama = treated("llama")
    assert llama.stored(llama.site, option).biases == (None,) * 4


def test_bfloat16_stays_bfloat16(tmp_path):
    model = made(MODELS["biased"][0]).bfloat16()
    space = build_space(
        discover(model, batch_of("biased")).sites, [Entry(("attention:*",), ("keep", "v50%"))], 4
    )
    site, option = space.sites[0], space.options[0][1]
    sums = collect(model, space.input_sites, [batch_of("biased", 3, 40)])
    write_statistics(tmp_path / "seen", sums)
    seen = StatisticsFiles(dict.fromkeys(site.input_names, tmp_path / "seen"))
    stored = realize_site(model, site, option, seen, "bfloat16", 4)
    tensors = [t for weight in stored.weights for t in weight.tensors.values()]
    assert {t.dtype for t in (*tensors, *stored.biases)} == {torch.bfloat16}
    apply(
        model, space, {site.name: "v50%"}, lambda *_: stored, {site.name: {"v50%": "linear.bf16"}}
    )
    with torch.no_grad():
        output = main_tensor(call(model, batch_of("biased")))
    assert output.dtype == torch.bfloat16 and output.isfinite().all()


def test_options_that_do_not_fit_are_told():
    sites = discover(made(MODELS["llama"][0]), batch_of("llama")).sites
    with pytest.raises(InvalidInput) as told:
        build_space(sites, [Entry(("attention:*",), ("keep", "v50%", "v50%+w4g5"))], 4)
    assert "v50%+w4g5" in str(told.value) and "group 5 does not divide" in str(told.value)
    with pytest.raises(InvalidInput, match="v50% of 8 value dimensions is no multiple of 8"):
        build_space(sites, [Entry(("attention:*",), ("keep", "v50%"))])
