"""Widths: which sub-blocks can be made narrower, by what, and why the others cannot."""

from threading import Lock

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from apportion.spaces.batches import call, frozen, main_tensor
from apportion.spaces.choice import Choice
from apportion.spaces.discovery import discover
from apportion.spaces.narrowing import narrowed_copy

HIDDEN, WORDS = 32, 96
SIZES = dict(hidden_size=HIDDEN, vocab_size=WORDS, num_hidden_layers=2)
HEADS = dict(num_attention_heads=4, intermediate_size=40)
GROUPED = HEADS | dict(num_key_value_heads=2)
STAGES = dict(embedding_size=16, hidden_sizes=[16, 32], depths=[2, 2])
TEXT = ("llama", "biased_llama", "qwen3", "gemma", "phi3", "neox", "opt", "gpt2", "bloom", "bert")


class Inverted(nn.Module):
    """MobileNetV2's block with squeeze and excitation: `[batch, 8, rows, columns]` -> the same."""

    def __init__(self) -> None:
        super().__init__()
        self.expand, self.expanded = nn.Conv2d(8, 24, 1, bias=False), nn.BatchNorm2d(24)
        self.depthwise = nn.Conv2d(24, 24, 3, padding=1, groups=24)
        self.filtered = nn.BatchNorm2d(24)
        self.squeeze, self.excite = nn.Conv2d(24, 4, 1), nn.Conv2d(4, 24, 1)
        self.project = nn.Conv2d(24, 8, 1)

    def forward(self, x):
        inner = torch.relu_(self.expanded(self.expand(x)))
        inner = torch.relu(self.filtered(self.depthwise(inner)))
        gate = self.excite(torch.relu(self.squeeze(inner.mean((2, 3), keepdim=True))))
        return x + self.project(inner * torch.sigmoid(gate))


class GroupedConvolutions(nn.Module):
    """ResNeXt's block: `[batch, 8, rows, columns]` -> the same; the middle has 4 groups of 3."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(8, 12, 1), nn.BatchNorm2d(12)
        self.middle, self.last = nn.Conv2d(12, 12, 3, padding=1, groups=4), nn.Conv2d(12, 8, 1)

    def forward(self, x):
        return x + self.last(torch.relu(self.middle(torch.relu(self.norm(self.first(x))))))


def pair(block):
    return lambda: nn.Sequential(block(), block())


def llama(**changes):
    config = transformers.LlamaConfig(**SIZES | GROUPED | changes)
    return transformers.LlamaForCausalLM(config)


def gpt2():
    sizes = dict(n_embd=HIDDEN, n_layer=2, n_head=4, n_positions=64, vocab_size=WORDS)
    config = transformers.GPT2Config(**sizes, bos_token_id=1, eos_token_id=2)
    return transformers.GPT2LMHeadModel(config)


def opt():
    sizes = dict(ffn_dim=40, word_embed_proj_dim=HIDDEN, max_position_embeddings=64)
    config = transformers.OPTConfig(**SIZES, **sizes, num_attention_heads=4)
    return transformers.OPTForCausalLM(config)


def bloom():
    config = transformers.BloomConfig(hidden_size=HIDDEN, n_layer=2, n_head=4, vocab_size=WORDS)
    return transformers.BloomForCausalLM(config)


def of(name, **keywords):
    """A transformers model by the name of its class without its task."""
    task = "ForImageClassification" if name in ("ViT", "ResNet") else "ForCausalLM"
    config = getattr(transformers, f"{name}Config")(**keywords)
    return lambda: getattr(transformers, name + ("ForMaskedLM" if name == "Bert" else task))(config)


PATCHES = dict(image_size=16, patch_size=4, hidden_size=HIDDEN, num_hidden_layers=2)
MODELS = {
    "llama": llama,
    "biased_llama": lambda: llama(attention_bias=True, mlp_bias=True),
    "qwen3": of("Qwen3", **SIZES, **GROUPED, head_dim=16),
    "gemma": of("Gemma", **SIZES, **GROUPED, head_dim=16),
    "phi3": of("Phi3", **SIZES, **GROUPED, pad_token_id=0, eos_token_id=2),
    "neox": of("GPTNeoX", **SIZES, **HEADS),
    "opt": opt,
    "gpt2": gpt2,
    "bloom": bloom,
    "bert": of("Bert", **SIZES, **HEADS),
    "vit": of("ViT", **PATCHES, **HEADS),
    "basic": of("ResNet", **STAGES, layer_type="basic"),
    "bottleneck": of("ResNet", **STAGES, layer_type="bottleneck"),
    "inverted": pair(Inverted),
    "grouped": pair(GroupedConvolutions),
}


def make(name):
    torch.manual_seed(0)
    model = frozen(MODELS[name]()).double()
    for path, tensor in model.state_dict().items():
        if path.endswith("running_var"):
            tensor.mul_(1 + torch.rand_like(tensor))
        elif tensor.ndim == 1:
            tensor.add_(0.1 * torch.randn_like(tensor))
        elif tensor.ndim > 1 and "embed" not in path:
            tensor.mul_(2)
    return model


def batch_of(name):
    generator = torch.Generator().manual_seed(1)
    if name in TEXT:
        return {"input_ids": torch.randint(3, WORDS, (2, 7), generator=generator)}
    rows = 16 if name == "vit" else 32 if name in ("basic", "bottleneck") else 5
    channels = 8 if name in ("inverted", "grouped") else 3
    return torch.randn(2, channels, rows, rows, generator=generator, dtype=torch.float64)


def site_of(model, batch, name):
    return next(site for site in discover(model, batch).sites if site.name == name)


LLAMA = "model.layers.1.self_attn"
GQA = {"q_proj": ("out", 16, 1), "k_proj": ("out", 8, 1), "v_proj": ("out", 8, 1)}
GQA16 = {"q_proj": ("out", 32, 1), "k_proj": ("out", 16, 1), "v_proj": ("out", 16, 1)}
MLP = {"gate_proj": ("out", 1, 1), "up_proj": ("out", 1, 1), "down_proj": ("in", 1, 1)}
MHA = {name: ("out", 8, 1) for name in ("q_proj", "k_proj", "v_proj")} | {"o_proj": ("in", 8, 1)}
BERT = {f"self.{name}": ("out", 8, 1) for name in ("query", "key", "value")}
BASIC = {"layer.0.convolution": ("out", 1, 1), "layer.1.convolution": ("in", 9, 1)}
INVERTED = dict(expand=("out", 1, 1), depthwise=("groups", 1, 1), project=("in", 1, 1))
INVERTED |= dict(squeeze=("in", 1, 1), excite=("out", 1, 1))
RESNEXT = dict(first=("out", 3, 1), middle=("groups", 3, 1), last=("in", 3, 1))
# Model, sub-block, unit, how many, sides of its layers, norms that follow.
FOUND = [
    ("llama", LLAMA, "head", 2, GQA | {"o_proj": ("in", 16, 1)}, ()),
    ("llama", "model.layers.1.mlp", "channel", 40, MLP, ()),
    ("biased_llama", LLAMA, "head", 2, GQA | {"o_proj": ("in", 16, 1)}, ()),
    ("biased_llama", "model.layers.1.mlp", "channel", 40, MLP, ()),
    ("qwen3", LLAMA, "head", 2, GQA16 | {"o_proj": ("in", 32, 1)}, ()),
    ("gemma", LLAMA, "head", 2, GQA16 | {"o_proj": ("in", 32, 1)}, ()),
    ("gemma", "model.layers.0.mlp", "channel", 40, MLP, ()),
    (
        "phi3",
        "model.layers.1.mlp",
        "channel",
        40,
        {"gate_up_proj": ("out", 1, 2), "down_proj": ("in", 1, 1)},
        (),
    ),
    (
        "neox",
        "gpt_neox.layers.1.attention",
        "head",
        4,
        {"query_key_value": ("out", 24, 1), "dense": ("in", 8, 1)},
        (),
    ),
    (
        "gpt2",
        "transformer.h.1.mlp",
        "channel",
        128,
        {"c_fc": ("out", 1, 1), "c_proj": ("in", 1, 1)},
        (),
    ),
    (
        "bert",
        "bert.encoder.layer.1.attention",
        "head",
        4,
        BERT | {"output.dense": ("in", 8, 1)},
        (),
    ),
    ("vit", "vit.layers.1.attention", "head", 4, MHA, ()),
    ("vit", "vit.layers.1.mlp", "channel", 40, dict(fc1=("out", 1, 1), fc2=("in", 1, 1)), ()),
    (
        "basic",
        "resnet.encoder.stages.1.layers.1",
        "channel",
        32,
        BASIC,
        ("layer.0.normalization",),
    ),
    (
        "bottleneck",
        "resnet.encoder.stages.1.layers.1",
        "channel",
        8,
        BASIC | {"layer.2.convolution": ("whole", 1, 1)},
        ("layer.0.normalization",),
    ),
    ("inverted", "1", "channel", 24, INVERTED, ("expanded", "filtered")),
    ("grouped", "1", "channel", 4, RESNEXT, ("norm",)),
]


@pytest.mark.parametrize("model, name, unit, units, sides, norms", FOUND)
def test_discover_finds_the_width_of_a_sub_block(model, name, unit, units, sides, norms):
    width = site_of(make(model), batch_of(model), name).width
    assert (width.unit, width.units) == (unit, units)
    found = {c.member.module: (c.side, c.features, c.stacks) for c in width.cuts}
    assert found == {f"{name}.{layer}": side for layer, side in sides.items()}
    assert width.norms == tuple(f"{name}.{norm}" for norm in norms)


@pytest.mark.parametrize("model", ["llama", "bert", "inverted"])
def test_groups_of_a_width_are_the_weight_sites_below_it(model):
    sites = discover(make(model), batch_of(model)).sites
    for site in sites:
        if site.width is not None:
            below = [s.members for s in sites if s.members and s.parent == site.name]
            assert list(site.groups) == below


@pytest.mark.parametrize("model, name", [row[:2] for row in FOUND])
@settings(max_examples=6, deadline=None)
@given(data=st.data())
def test_narrowed_copy_is_the_dense_one_without_the_other_units(model, name, data):
    dense, batch = make(model), batch_of(model)
    site = site_of(dense, batch, name)
    units = range(site.width.units)
    kept = sorted(data.draw(st.sets(st.sampled_from(units), min_size=1, max_size=len(units))))
    narrow = narrowed_copy(dense, site, kept)
    narrowed = make(model)
    narrowed.set_submodule(name, narrow)
    # Of what takes units, all inputs of the others become zero.
    for cut in site.width.cuts:
        if cut.side == "in":
            weight = dense.get_submodule(cut.member.module).weight
            by_unit = weight if cut.member.transposed else weight.movedim(1, 0)
            per_unit = len(by_unit) // len(units)
            for unit in set(units) - set(kept):
                by_unit[unit * per_unit : (unit + 1) * per_unit] = 0
    with torch.no_grad():
        expected, given = (main_tensor(call(m, batch)) for m in (dense, narrowed))
    assert (given - expected).norm() <= 1e-10 * expected.norm()


SUB_BLOCKS = "it is as wide as its sub-blocks, which are narrowed each by itself"


@pytest.mark.parametrize(
    "model, name, reason",
    [
        ("llama", "model.layers.0", SUB_BLOCKS),
        ("opt", "model.decoder.layers.0", SUB_BLOCKS),
        ("opt", "model.decoder.layers.0.self_attn", "with 2 of 4 heads"),
        ("gpt2", "transformer.h.0.attn", "takes their number from elsewhere"),
        ("bloom", "transformer.h.0.self_attention", "its forward fails"),
        ("phi3", "model.layers.0.self_attn", "nothing of what qkv_proj gives can be left out"),
    ],
)
def test_discover_gives_the_reason_why_a_sub_block_has_no_width(model, name, reason):
    found = discover(make(model), batch_of(model))
    assert reason in found.fixed_widths[name]
    assert next(site for site in found.sites if site.name == name).width is None


@pytest.mark.parametrize(
    "model, name, reason",
    [
        ("llama", "model.layers.0.self_attn", "of what k_proj and q_proj and v_proj give can"),
        ("gpt_oss", "model.layers.0.mlp", "a token is given to all"),
        ("vision", "blocks.0.attention", "in_proj_weight is written back"),
        ("conv", "blocks.1", "no layer in it takes what another layer in it gives"),
    ],
)
def test_discover_gives_the_reason_of_one_head_and_of_unknown_forwards(
    make_model, make_batch, model, name, reason
):
    assert reason in discover(make_model(model), make_batch(model)).fixed_widths[name]


def test_recurrent_model_has_no_widths(make_model, make_batch):
    found = discover(make_model("recurrent"), make_batch("recurrent"))
    assert found.fixed_widths == {} and not any(site.width for site in found.sites)


class Perceptron(nn.Module):
    """`[batch, 8]` -> the same: two layers and what a test puts between them."""

    def __init__(self, between=torch.relu, **modules) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 12), nn.Linear(12, 8)
        for name, module in modules.items():
            setattr(self, name, module)
        self.settings = between

    def forward(self, x):
        return self.last(self.settings(self.first(x)))


class Normed(Perceptron):
    def __init__(self) -> None:
        super().__init__(norm=nn.LayerNorm(12))

    def forward(self, x):
        return self.last(self.norm(self.first(x)))


class Sliced(Perceptron):
    def forward(self, x):
        return self.last(self.first(x)[:, :12].relu() * (12 / len(self.first.bias)))


class Viewed(Perceptron):
    heads = 2

    def forward(self, x):
        return self.last(self.first(x).view(len(x), self.heads, -1).softmax(-1).flatten(1))


class ViewedByFour(Viewed):
    heads = 4


class Unused(Perceptron):
    def forward(self, x):
        return self.last(torch.zeros(len(x), 1) * self.first(x)) + x


class Doubled(Perceptron):
    def __init__(self) -> None:
        super().__init__(middle=nn.Linear(12, 12))

    def forward(self, x):
        inner = self.first(x)
        return self.last(inner + self.middle(inner))


class Tied(Perceptron):
    def __init__(self) -> None:
        super().__init__(spare=nn.Linear(8, 12))
        self.spare.weight = self.first.weight


class Chosen(Perceptron):
    def __init__(self) -> None:
        super().__init__(choice=Choice({"relu": nn.ReLU(), "line": nn.Linear(12, 12)}))

    def forward(self, x):
        return self.last(self.choice(self.first(x)))


class Skipping(Perceptron):
    def __init__(self) -> None:
        super().__init__(spare=nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)]))

    def forward(self, x):
        return self.last(self.first(x).relu()) + self.spare[0](x)


class Locked(Perceptron):
    def __init__(self) -> None:
        super().__init__(lock=Lock())


class Overwriting(Perceptron):
    def forward(self, x):
        inner = self.first(x).exp()
        output = self.last(inner.sigmoid())
        inner.zero_()
        return output


@pytest.mark.parametrize(
    "block, reason",
    [
        (Normed, "nothing of what first gives can be left out"),
        (Sliced, "it does not give what it gives without the others"),
        (Viewed, "with 1 of 2 channels it does not give what it gives without the others"),
        (ViewedByFour, "its forward fails: it takes their number from elsewhere"),
        (Unused, "its output is the same, so nothing is proven"),
        (Doubled, "middle both gives and takes the same units"),
        (Tied, "its weight is tied to another layer's"),
        (Chosen, "it holds the choice block 0.choice"),
        (Locked, "it cannot be copied (cannot pickle '_thread.lock' object)"),
        (Overwriting, "torch cannot differentiate it (one of the variables"),
        (Skipping, "0.spare.1: the batch does not reach it"),
    ],
)
def test_block_that_hides_its_width_is_refused(block, reason):
    torch.manual_seed(0)
    model = frozen(nn.Sequential(block(), block()))
    found = discover(model, torch.randn(5, 8))
    assert set(found.fixed_widths) == {"0", "1"} and reason in found.fixed_widths["0"]


class Watched(nn.Module):
    """A block that counts on what the one around it has just set."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = Perceptron(self.scaled)
        self.scale = None

    def scaled(self, inner):
        return inner.relu() * self.scale

    def forward(self, x):
        self.scale = torch.ones(())
        output = x + self.mlp(x)
        self.scale = None
        return output


def test_sub_block_that_cannot_be_run_by_itself_is_refused():
    found = discover(frozen(nn.Sequential(Watched(), Watched())), torch.randn(5, 8))
    assert found.fixed_widths["1.mlp"].startswith("it cannot be run by itself (TypeError: ")


def test_sub_blocks_with_other_settings_are_proven_each_by_itself():
    torch.manual_seed(0)
    model = nn.Sequential(*(Perceptron() for _ in range(3)))
    model[1].settings = lambda inner: inner.view(len(inner), 4, -1).softmax(-1).flatten(1)
    found = discover(frozen(model), torch.randn(5, 8))
    assert [*found.fixed_widths] == ["1"]
    assert [site.width.units for site in found.sites if site.width] == [12, 12]


@pytest.mark.parametrize("model", ["llama", "bert"])
def test_widths_do_not_depend_on_the_precision(model):
    sites = discover(make(model), batch_of(model)).sites
    for dtype in (torch.float32, torch.bfloat16):
        assert discover(make(model).to(dtype), batch_of(model)).sites == sites


class Buried(Perceptron):
    """What the layers add is lost in what 16 bits can say of the sum."""

    def forward(self, x):
        return 10000 * x + self.last(self.first(x).relu())


def test_width_is_found_where_16_bits_do_not_show_it():
    torch.manual_seed(0)
    model = frozen(nn.Sequential(Buried(), Buried())).to(torch.bfloat16)
    sites = discover(model, torch.randn(5, 8, dtype=torch.bfloat16)).sites
    assert [site.width.units for site in sites if site.is_structure] == [12, 12]


def test_width_is_found_where_the_forward_writes_over_what_a_layer_gives():
    model = frozen(nn.Sequential(Perceptron(torch.relu_), Perceptron(torch.relu_)))
    sites = discover(model, torch.randn(5, 8)).sites
    assert [site.width.units for site in sites if site.is_structure] == [12, 12]


class Counted(Perceptron):
    runs = []

    def __init__(self, layer_idx) -> None:
        super().__init__()
        self.layer_idx = layer_idx

    def forward(self, x):
        self.runs.append(self.layer_idx)
        return super().forward(x)


def test_of_like_sub_blocks_only_the_first_is_run_again():
    found = discover(frozen(nn.Sequential(*map(Counted, range(4)))), torch.randn(5, 8))
    assert sum(site.width is not None for site in found.sites) == 4
    assert [Counted.runs.count(place) for place in (1, 2, 3)] == [1, 1, 1]


class Tempered(Perceptron):
    """`[batch, tokens, 8]`: how sharply tokens look at each other depends on the width."""

    def forward(self, x):
        inner = self.first(x)
        return self.last((x @ x.mT * inner.shape[-1]).softmax(-1) @ inner)


def test_what_only_tokens_that_differ_show_is_seen_on_like_tokens():
    torch.manual_seed(0)
    model = frozen(nn.Sequential(Tempered(), Tempered()))
    reason = "it does not give what it gives without the others"
    assert reason in discover(model, torch.ones(1, 5, 8)).fixed_widths["0"]


@pytest.mark.parametrize("model", ["llama", "inverted"])
def test_discover_leaves_the_model_and_the_random_state_as_they_are(model):
    dense, batch = make(model).requires_grad_(True), batch_of(model)
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    state = torch.get_rng_state()
    discover(dense, batch)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(dense.state_dict()[name], tensor) for name, tensor in before.items())
    assert all(p.requires_grad and p.grad is None for p in dense.parameters())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in dense.modules())
