"""Norms that one site alone reads: found by trying, in whatever model, and refused elsewhere."""

import pytest
import torch
import transformers
from torch import nn

from apportion.spaces import norms
from apportion.spaces.batches import frozen
from apportion.spaces.discovery import discover

WIDTH, WORDS, BLOCKS = 32, 96, 2
SIZES = dict(hidden_size=WIDTH, intermediate_size=64, vocab_size=WORDS, num_hidden_layers=BLOCKS)
SIZES |= dict(num_attention_heads=2)
GROUPED = SIZES | dict(num_key_value_heads=1)
PLACES = dict(max_position_embeddings=64, bos_token_id=1, eos_token_id=2)
OTHERS = {
    "gemma": ("Gemma", GROUPED | dict(head_dim=16)),
    "neox": ("GPTNeoX", SIZES | PLACES),
    "phi": ("Phi", SIZES | PLACES),
    "gptj": (
        "GPTJ",
        dict(n_embd=WIDTH, n_layer=BLOCKS, n_head=2, rotary_dim=8, vocab_size=WORDS)
        | dict(n_positions=64, bos_token_id=1, eos_token_id=2),
    ),
}
GAIN, BOTH = ("weight",), ("weight", "bias")
# model -> what reads a norm alone in each block: the end of its name, the norm, its vectors
FOUND = {
    "llama": [("q_proj+k_proj+v_proj", "input_layernorm", GAIN, 0)]
    + [("gate_proj+up_proj", "post_attention_layernorm", GAIN, 0)],
    "gemma": [("q_proj+k_proj+v_proj", "input_layernorm", GAIN, 1)]
    + [("gate_proj+up_proj", "post_attention_layernorm", GAIN, 1)],
    "gpt2": [("c_attn", "ln_1", BOTH, 0), ("c_fc", "ln_2", BOTH, 0)],
    "opt": [("k_proj+v_proj+q_proj", "self_attn_layer_norm", BOTH, 0)]
    + [("fc1", "final_layer_norm", BOTH, 0)],
    # attention and MLP run beside each other, but each reads a norm of its own
    "neox": [("query_key_value", "input_layernorm", BOTH, 0)]
    + [("dense_h_to_4h", "post_attention_layernorm", BOTH, 0)],
    # the router and the experts read the second one
    "mixtral": [("q_proj+k_proj+v_proj", "input_layernorm", GAIN, 0)],
    "qwen2_moe": [("q_proj+k_proj+v_proj", "input_layernorm", GAIN, 0)],
    # attention and MLP read one norm
    "phi": [],
    "gptj": [],
    # what is normed is the residual too
    "bert": [],
    "conv": [],
    "vision": [],
}


@pytest.fixture(scope="module")
def make(make_model):
    def build(family):
        if family not in OTHERS:
            return make_model(family)
        name, sizes = OTHERS[family]
        torch.manual_seed(0)
        config = getattr(transformers, f"{name}Config")(**sizes)
        return frozen(getattr(transformers, f"{name}ForCausalLM")(config))

    return build


def norms_of(model, batch):
    """(end of a site's name, end of its norm's, vectors, offset) of the first block's sites."""
    sites = [site for site in discover(model, batch).sites if site.members]
    assert all(site.norm is None for site in sites if site.optional)
    first = [s for s in sites if ".0." in s.name and s.norm is not None]
    return [
        (
            site.name.rpartition(".")[2],
            site.norm.module.rpartition(".")[2],
            site.norm.vectors,
            site.norm.offset,
        )
        for site in first
    ]


@pytest.mark.parametrize("family", FOUND)
def test_norms_are_found_where_one_site_alone_reads_them(make, make_batch, family):
    model, batch = make(family), make_batch("llama" if family in OTHERS else family)
    assert norms_of(model, batch) == FOUND[family]


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_norms_of_all_blocks_are_their_own(make, make_batch, family):
    sites = discover(make(family), make_batch(family)).sites
    found = [site for site in sites if site.norm is not None]
    blocks = [site.name for site in sites if site.kind == "block"]
    assert len(found) == 2 * len(blocks)
    for site in found:
        (block,) = (name for name in blocks if site.name.startswith(f"{name}."))
        assert site.norm.module.startswith(f"{block}.")


def test_norms_of_a_bfloat16_model_are_found(make, make_batch):
    assert norms_of(make("llama").bfloat16(), make_batch("llama")) == FOUND["llama"]


def test_of_like_blocks_one_is_tried(make, make_batch, monkeypatch):
    tried, proven = [], norms._is_read_alone
    monkeypatch.setattr(
        norms, "_is_read_alone", lambda *given: tried.append(given[1].module) or proven(*given)
    )
    discover(make("llama"), make_batch("llama"))
    assert tried == ["input_layernorm", "post_attention_layernorm"]


class Shifted(nn.Module):
    """A norm of another form, with its vectors in another order."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.randn(WIDTH))
        self.excess = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x):
        return x / x.norm(dim=-1, keepdim=True) * (1 + self.excess) + self.shift


class Powered(nn.Module):
    """Its vector multiplies in no form that is tried."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(WIDTH) + 0.5)

    def forward(self, x):
        return x / x.norm(dim=-1, keepdim=True) * self.weight.square()


class Block(nn.Module):
    """One MLP behind a norm; `also` reads the norm as well."""

    def __init__(self, norm, also=None):
        super().__init__()
        self.before = norm()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 64), nn.ReLU(), nn.Linear(64, WIDTH))
        self.also = also

    def forward(self, x):
        y = self.before(x)
        x = x + self.mlp(y)
        return x if self.also is None else self.also(x, y)


def model_of(*blocks):
    torch.manual_seed(0)
    return frozen(nn.Sequential(*(make() for make in blocks)))


ALSO = {
    "a little of the residual": lambda x, y: x + 0.01 * y,
    "a second output": lambda x, y: (x, y),
    "a gate": lambda x, y: x * y[..., :1].sigmoid(),
}


def test_norm_of_any_code_is_found():
    model = model_of(*[lambda: Block(Shifted)] * 2)
    sites = {site.name: site.norm for site in discover(model, torch.randn(2, 5, WIDTH)).sites}
    assert sites["1.mlp.0"] == norms.Norm("1.before", ("excess", "shift"), 1)
    assert sites["1.mlp.2"] is None


@pytest.mark.parametrize("reason", ALSO)
def test_norm_that_something_else_reads_is_none(reason):
    model = model_of(*[lambda: Block(Shifted, ALSO[reason])] * 2)
    if reason == "a second output":
        model = frozen(Pairs(model))
    assert not [s for s in discover(model, torch.randn(2, 5, WIDTH)).sites if s.norm]


class Pairs(nn.Module):
    """Hands on the first of what each block returns."""

    def __init__(self, blocks):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x):
        for block in self.blocks:
            x, y = block(x)
        return x + y


@pytest.mark.parametrize("norm", [Powered, lambda: nn.LayerNorm(WIDTH, elementwise_affine=False)])
def test_norm_that_cannot_take_scales_is_none(norm):
    model = model_of(*[lambda: Block(norm)] * 2)
    assert not [s for s in discover(model, torch.randn(2, 5, WIDTH)).sites if s.norm]


def test_norm_whose_vectors_another_module_shares_is_none():
    model = model_of(*[lambda: Block(lambda: nn.LayerNorm(WIDTH))] * 3)
    model[0].before.weight = model[2].before.weight
    sites = {site.name: site.norm for site in discover(model, torch.randn(2, 5, WIDTH)).sites}
    assert [name for name, norm in sites.items() if norm is not None] == ["1.mlp.0"]
