"""Which rows of attention are its queries and keys, and what is done to them, found by trying."""

import pytest
import torch
import transformers
from torch import nn
from torch.nn.functional import layer_norm, scaled_dot_product_attention

from apportion.errors import InvalidInput
from apportion.spaces.apply import apply, bias_of
from apportion.spaces.batches import call, frozen, main_tensor
from apportion.spaces.calibration import collect
from apportion.spaces.discovery import discover
from apportion.spaces.entries import Entry, build_space
from apportion.spaces.grammar import parse_option
from apportion.spaces.narrowing import moved
from apportion.spaces.realization import realize_site
from apportion.spaces.statistics import StatisticsFiles, write_statistics
from apportion.spaces.views import matrix_of, parameter_at

HIDDEN, WORDS = 32, 96
SIZES = dict(hidden_size=HIDDEN, vocab_size=WORDS, num_hidden_layers=2, intermediate_size=40)
HEADS = SIZES | dict(num_attention_heads=4)
GROUPED = HEADS | dict(num_key_value_heads=2)
ENDS = dict(pad_token_id=0, eos_token_id=2)
OPT = dict(ffn_dim=40, word_embed_proj_dim=HIDDEN, max_position_embeddings=64)
GPT = dict(n_embd=HIDDEN, n_layer=2, n_head=4, n_positions=64, vocab_size=WORDS, bos_token_id=1)
HALVES = (4, 5, 6, 7, 0, 1, 2, 3)
FIRST_HALVES = (2, 3, 0, 1, 4, 5, 6, 7)
NEIGHBORS = (1, 0, 3, 2, 5, 4, 7, 6)


def of(name, task="ForCausalLM", **settings):
    config = getattr(transformers, f"{name}Config")(**settings)
    return lambda: getattr(transformers, name + task)(config)


# Name -> the model, its pairs, and of each layer with queries or keys the end of its name, the
# key-value heads of its stacks of 8 rows, and which of these are keys. Without biases queries and
# keys of as many heads cannot be told apart, and need not be.
GROUPS = [("q_proj", (0, 0, 1, 1), ()), ("k_proj", (0, 1), (0, 1))]
EVERY = (0, 1, 2, 3)
FUSED = (*EVERY, *EVERY, -1, -1, -1, -1)
IN_TURN = (0, 0, -1, 1, 1, -1, 2, 2, -1, 3, 3, -1)
MODELS = {
    "llama": (of("Llama", **GROUPED), HALVES, GROUPS),
    "biased": (of("Llama", **GROUPED, attention_bias=True), HALVES, GROUPS),
    "one key-value head": (
        of("Llama", **HEADS, num_key_value_heads=1),
        HALVES,
        [("q_proj", (0, 0, 0, 0), ()), ("k_proj", (0,), (0,))],
    ),
    "qwen2": (of("Qwen2", **GROUPED), HALVES, GROUPS),
    "gemma": (of("Gemma2", **GROUPED, head_dim=8, sliding_window=4), HALVES, GROUPS),
    "phi3": (of("Phi3", **HEADS, **ENDS), HALVES, [("qkv_proj", FUSED, (4, 5, 6, 7))]),
    "grouped phi3": (
        of("Phi3", **GROUPED, **ENDS),
        HALVES,
        [("qkv_proj", (0, 0, 1, 1, 0, 1, -1, -1), (4, 5))],
    ),
    "phi": (
        of("Phi", **HEADS, **ENDS),
        FIRST_HALVES,
        [("q_proj", EVERY, ()), ("k_proj", EVERY, EVERY)],
    ),
    "neox": (
        of("GPTNeoX", **HEADS, rotary_pct=0.5),
        FIRST_HALVES,
        [("query_key_value", IN_TURN, (1, 4, 7, 10))],
    ),
    "cohere": (of("Cohere", **GROUPED, **ENDS), NEIGHBORS, GROUPS),
    "glm": (of("Glm", **GROUPED, head_dim=8, **ENDS), NEIGHBORS, GROUPS),
    "opt": (of("OPT", **HEADS, **OPT), (), [("k_proj", EVERY, EVERY), ("q_proj", EVERY, ())]),
    "gpt2": (
        of("GPT2", "LMHeadModel", **GPT, eos_token_id=2),
        (),
        [("c_attn", FUSED, (4, 5, 6, 7))],
    ),
    "bloom": (
        of("Bloom", hidden_size=HIDDEN, n_layer=2, n_head=4, vocab_size=WORDS),
        (),
        [("query_key_value", IN_TURN, (1, 4, 7, 10))],
    ),
    "bert": (of("Bert", "ForMaskedLM", **HEADS), (), [("query", EVERY, ()), ("key", EVERY, EVERY)]),
    "vit": (
        of("ViT", "ForImageClassification", **HEADS, image_size=16, patch_size=4),
        (),
        [("q_proj", EVERY, ()), ("k_proj", EVERY, EVERY)],
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


def batch_of(name):
    generator = torch.Generator().manual_seed(1)
    if name == "vit":
        return torch.randn(2, 3, 16, 16, generator=generator)
    return {"input_ids": torch.randint(3, WORDS, (2, 9), generator=generator)}


def attention_of(found):
    return next(site for site in found.sites if site.kind == "attention")


@pytest.mark.parametrize("name", MODELS)
def test_queries_and_keys_are_found_and_what_is_rotated(name):
    build, pairs, layers = MODELS[name]
    width = attention_of(discover(made(build), batch_of(name))).query_keys
    assert width is not None and width.pairs == pairs
    assert width.units == 8 * width.heads
    found = [cut for cut in width.cuts if cut.heads]
    assert len(found) == len(layers) and {cut.side for cut in width.cuts} <= {"out", "whole"}
    for cut, (leaf, heads, keys) in zip(found, layers, strict=True):
        assert cut.member.module.endswith(leaf)
        assert (cut.heads, cut.keys) == (heads, keys)


def test_all_like_sub_blocks_have_the_width_at_their_own_paths():
    found = discover(made(MODELS["neox"][0]), batch_of("neox"))
    first, second = (site for site in found.sites if site.kind == "attention")
    assert moved(first.query_keys, first.name, second.name) == second.query_keys
    assert not any(site.query_keys for site in found.sites if site.kind != "attention")


class Attention(nn.Module):
    """Four heads `[batch, tokens, 32]` -> the same; `treated` is done to queries and keys."""

    def __init__(self, treated=lambda y: y, bias=True) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(HIDDEN, HIDDEN, bias) for _ in range(4))
        self.treated = treated

    def heads(self, layer, x):
        return layer(x).unflatten(-1, (4, 8)).transpose(1, 2)

    def forward(self, x):
        q, k, v = (self.heads(layer, x) for layer in (self.q, self.k, self.v))
        mixed = scaled_dot_product_attention(self.treated(q), self.treated(k), v, is_causal=True)
        return self.o(mixed.transpose(1, 2).flatten(2))


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


def turned(first, step, slowness=1.0):
    """Rotates dimension i with i + step, from `first` on, each pair slower than the one before."""
    ones = [first + i for i in range(8 - first) if i // step % 2 == 0]

    def treated(y):
        others, count = [one + step for one in ones], len(ones)
        speeds = slowness * 0.3 ** torch.arange(count)
        angles = torch.arange(y.shape[-2])[:, None] * speeds
        new = y.clone()
        new[..., ones] = angles.cos() * y[..., ones] - angles.sin() * y[..., others]
        new[..., others] = angles.sin() * y[..., ones] + angles.cos() * y[..., others]
        return new

    return treated


def pairs_of(model):
    width = attention_of(discover(made(model), torch.randn(2, 6, HIDDEN))).query_keys
    return width and width.pairs


def test_plain_attention_of_the_same_code_has_free_dimensions():
    assert pairs_of(two(Attention)) == ()
    assert pairs_of(two(lambda: Attention(bias=False))) == ()


@pytest.mark.parametrize("step, pairs", [(1, NEIGHBORS), (4, HALVES)])
def test_rotated_pairs_are_told_apart(step, pairs):
    assert pairs_of(two(lambda: Attention(turned(0, step)))) == pairs


def test_pairs_that_hardly_turn_within_the_sample_are_no_free_dimensions():
    def slow(y):
        return torch.cat([turned(0, 1)(y)[..., :4], turned(0, 1, 1e-7)(y)[..., 4:]], -1)

    assert pairs_of(two(lambda: Attention(slow))) == NEIGHBORS


NORMED = "queries or keys are normed before their product (QK-norm)"
NO_PRODUCT = "no plain products of what its layers give"
REFUSED = {
    "normed": (lambda: Attention(lambda y: layer_norm(y, (8,)), bias=False), NORMED),
    "rotated at the end": (lambda: Attention(turned(4, 2)), NO_PRODUCT),
    "activated": (lambda: Attention(torch.tanh), NO_PRODUCT),
    "shared": (Shared, NO_PRODUCT),
    "shifted after": (lambda: Attention(lambda y: y + 1), NO_PRODUCT),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_done_to_queries_and_keys_beside_rotating_refuses_them(name):
    attention, told = REFUSED[name]
    found = discover(made(two(attention)), torch.randn(2, 6, HIDDEN))
    site = attention_of(found)
    assert site.query_keys is None and told in found.fixed_query_keys[site.name]
    with pytest.raises(InvalidInput, match="q50%.* is for none of the sites.*qP% where queries"):
        build_space(found.sites, [Entry(("attention:*",), ("keep", "drop", "q50%"))])


def test_normed_queries_and_keys_of_qwen3_are_told():
    found = discover(made(of("Qwen3", **GROUPED, head_dim=8)), batch_of("qwen3"))
    site = attention_of(found)
    assert site.query_keys is None and NORMED in found.fixed_query_keys[site.name]


def thinned(model, width):
    """Of each head's queries half of the dimensions taken away, rotated ones as pairs, in place."""
    pairs = width.pairs or range(8)
    free = [one for one, other in enumerate(pairs) if one == other]
    rotated = [(one, other) for one, other in enumerate(pairs) if one < other]
    for cut in width.cuts:
        rows = matrix_of(parameter_at(model, cut.member.parameter_path), cut.member)
        bias = bias_of(model, cut.member.module)
        for stack, head in enumerate(cut.heads):
            if head < 0 or stack in cut.keys:
                continue
            generator = torch.Generator().manual_seed(head)
            left = torch.zeros(8, 8)
            basis, _ = torch.linalg.qr(torch.randn(len(free), len(free), generator=generator))
            half = basis[:, : len(free) // 2]
            left[torch.tensor(free, dtype=torch.int64)[:, None], free] = half @ half.T
            chosen = torch.randperm(len(rotated), generator=generator)[: len(rotated) // 2]
            stay = [place for pair in chosen.tolist() for place in rotated[pair]]
            left[stay, stay] = 1
            own = slice(8 * stack, 8 * stack + 8)
            rows[own] = left @ rows[own]
            if bias is not None:
                bias[own] = left @ bias[own]


@pytest.mark.parametrize("text", ["q50%", "q50%:svd"])
@pytest.mark.parametrize("name", MODELS)
def test_dimensions_that_scores_do_not_need_are_left_out_without_loss(name, text, tmp_path):
    model = made(MODELS[name][0])
    for site in discover(model, batch_of(name)).sites:
        if site.query_keys is not None:
            thinned(model, site.query_keys)
    dense = main_tensor(call(model, batch_of(name)))
    sites = discover(model, batch_of(name)).sites
    space = build_space(sites, [Entry(("attention:*",), ("keep", text))], 2)
    write_statistics(tmp_path / "seen", collect(model, space.input_sites, [batch_of(name)]))
    names = [each for site in space.sites for each in site.input_names]
    seen = StatisticsFiles(dict.fromkeys(names, tmp_path / "seen"))
    stored = {
        site.name: realize_site(model, site, parse_option(text), seen, "float32", 2)
        for site in space.sites
    }
    chosen = dict.fromkeys(space.names, text)
    named = {site: {text: "linear.f32"} for site in space.names}
    apply(model, space, chosen, lambda site, _: stored[site.name], named)
    found = main_tensor(call(model, batch_of(name)))
    assert (found - dense).norm() <= 1e-4 * dense.norm()
    assert all(len(each.kept) == 4 * site.query_keys.heads
               for site, each in zip(space.sites, stored.values(), strict=True))  # fmt: skip


def test_options_that_do_not_fit_are_told():
    sites = discover(made(MODELS["llama"][0]), batch_of("llama")).sites
    with pytest.raises(InvalidInput) as told:
        build_space(sites, [Entry(("attention:*",), ("keep", "q50%", "q50%+w4g5"))], 4)
    assert "q50%+w4g5" in str(told.value) and "group 5 does not divide" in str(told.value)
    with pytest.raises(InvalidInput, match="q50% of 8 query-key dimensions is no multiple of 8"):
        build_space(sites, [Entry(("attention:*",), ("keep", "q50%"))])
