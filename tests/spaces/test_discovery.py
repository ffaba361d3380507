"""Discovery: which sites a model has, what their modules return, and why the rest has none."""

import pytest
import torch
from torch import nn

from apportion.spaces.discovery import discover

GROUPS = {
    "llama": ("model.layers.1.", {"self_attn.q_proj+k_proj+v_proj", "mlp.gate_proj+up_proj"}),
    "qwen3": ("model.layers.1.", {"self_attn.q_proj+k_proj+v_proj", "mlp.gate_proj+up_proj"}),
    "opt": ("model.decoder.layers.1.", {"self_attn.k_proj+v_proj+q_proj"}),
    "gpt2": ("transformer.h.1.", set()),
    "bert": ("bert.encoder.layer.1.", {"attention.self.query+key+value"}),
}
SUB_BLOCKS = {
    "llama": {"self_attn": "attention", "mlp": "mlp"},
    "qwen3": {"self_attn": "attention", "mlp": "mlp"},
    "opt": {"self_attn": "attention"},
    "gpt2": {"attn": "attention", "mlp": "mlp"},
    "bert": {"attention": "attention"},
}


@pytest.fixture
def found(make_model, make_batch):
    return lambda family: discover(make_model(family), make_batch(family))


@pytest.mark.parametrize("family", GROUPS)
def test_discover_fuses_layers_that_share_their_input(found, family):
    prefix, groups = GROUPS[family]
    fused = {s.name for s in found(family).sites if len(s.members) > 1 and prefix in s.name}
    assert fused == {prefix + group for group in groups}


@pytest.mark.parametrize("family", SUB_BLOCKS)
def test_discover_finds_blocks_and_their_sub_blocks(found, family):
    prefix, expected = GROUPS[family][0], SUB_BLOCKS[family]
    structure = [s for s in found(family).sites if s.is_structure]
    blocks = [s for s in structure if s.kind == "block"]
    assert len(blocks) == 3 and all(b.residual_inside and b.output == "tensor" for b in blocks)
    below = {s.name: s.kind for s in structure if s.parent == prefix[:-1]}
    assert below == {prefix + leaf: kind for leaf, kind in expected.items()}


@pytest.mark.parametrize("family", GROUPS)
def test_discover_says_what_a_sub_block_returns(found, family):
    attention = next(s for s in found(family).sites if s.kind == "attention")
    assert (attention.output, attention.output_length) == ("tuple", 2)
    # BERT's attention ends in its own residual and norm; the others leave the sum to the block.
    assert attention.residual_inside == (family == "bert")


@pytest.mark.parametrize("family", [*GROUPS, "conv", "mixtral", "vision", "recurrent"])
def test_discover_puts_parents_first_and_each_layer_once(found, family):
    sites = found(family).sites
    names = [site.name for site in sites]
    for place, site in enumerate(sites):
        assert site.parent is None or site.parent in names[:place]
        assert all(m.path.startswith(site.parent or "") for m in site.members)
    layers = [member.path for site in sites for member in site.members]
    assert len(layers) == len(set(layers))


def test_discover_gpt2_conv1d_is_transposed(found, make_model):
    model, sites = make_model("gpt2"), found("gpt2").sites
    member = next(s for s in sites if s.name == "transformer.h.0.attn.c_attn").members[0]
    assert member.transposed
    shape = (member.shape.in_features, member.shape.out_features)
    assert tuple(model.get_submodule(member.module).weight.shape) == shape == (32, 96)


@pytest.mark.parametrize("family", ["qwen3", "opt", "gpt2", "bert"])
def test_discover_tied_head_is_untreated(found, family):
    head = "cls.predictions.decoder" if family == "bert" else "lm_head"
    assert found(family).untreated == {head: "its weight is tied to another layer's"}


def test_discover_untied_head_is_optional(found):
    discovery = found("llama")
    assert [s.name for s in discovery.sites if s.optional] == ["lm_head"]
    assert discovery.untreated == {}


def test_discover_conv_net_has_blocks_and_convolutions(found):
    sites = {site.name: site for site in found("conv").sites}
    assert [s.name for s in sites.values() if s.is_structure] == ["blocks.0", "blocks.1"]
    grouped = sites["blocks.1.first"]
    assert (grouped.kind, grouped.parent) == ("conv", "blocks.1")
    shape = grouped.members[0].shape
    assert (shape.out_features, shape.in_features, shape.conv.groups) == (16, 36, 4)
    assert sites["stem"].members[0].shape.conv.stride == (2, 2)
    assert not any(site.optional for site in sites.values())


class Odd(nn.Module):
    """`[batch, tokens, 8]`: a layer called twice, one never called, and layers of other kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.never, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.memory = nn.LSTM(8, 8, batch_first=True)
        self.line = nn.Conv1d(8, 8, 1)
        self.mirrored = nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect")
        self.own = nn.Parameter(torch.eye(8))
        self.added = nn.Parameter(torch.ones(4, 8))
        self.pair = nn.Bilinear(8, 8, 8)

    def forward(self, x):
        x = self.twice(self.twice(x)) @ self.own + self.added
        x = self.memory(self.attention(x, x, x)[0])[0]
        x = self.mirrored(self.line(x.transpose(1, 2)).transpose(1, 2).unsqueeze(1))
        return self.last(self.pair(x.squeeze(1), x.squeeze(1)))


@pytest.mark.parametrize(
    "path, reason",
    [
        ("never", "the model's forward does not call it as a layer"),
        ("added", "Odd: the forward multiplies by it in no way that is known"),
        ("pair", "Bilinear: the forward multiplies by it in no way that is known"),
    ],
)
def test_discover_gives_the_reason_for_untreated_layers(path, reason):
    discovery = discover(Odd().eval(), torch.randn(1, 4, 8))
    assert discovery.untreated[path] == reason and len(discovery.untreated) == 3


def test_discover_writes_back_what_no_operator_can_replace():
    sites = discover(Odd().eval(), torch.randn(1, 4, 8)).sites
    assert [site.name for site in sites if not site.written_back] == ["last"]
    assert {site.name: site.kind for site in sites if site.written_back} == {
        "own": "linear",
        "twice.weight": "linear",
        "attention.in_proj_weight": "linear",
        "attention.out_proj.weight": "linear",
        "memory.weight_ih_l0": "linear",
        "memory.weight_hh_l0": "linear",
        "line.weight": "conv",
        "mirrored.weight": "conv",
    }


def test_discover_writes_back_layers_that_torch_may_bypass():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    discovery = discover(nn.TransformerEncoder(layer, 2).eval(), torch.randn(2, 5, 16))
    assert all(site.written_back for site in discovery.sites) and discovery.untreated == {}
    assert [m.path for s in discovery.sites[:4] for m in s.members] == [
        "layers.0.self_attn.in_proj_weight",
        "layers.0.self_attn.out_proj.weight",
        "layers.0.linear1.weight",
        "layers.0.linear2.weight",
    ]


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss"])
def test_discover_puts_the_stacked_experts_of_a_block_into_one_site(found, family):
    discovery = found(family)
    written = {site.name: site for site in discovery.sites if site.written_back}
    experts = "model.layers.{}.mlp.experts.{}"
    leaves = ("gate_up_proj", "down_proj")
    assert [*written] == [experts.format(n, leaf) for n in (0, 1) for leaf in leaves]
    for name, site in written.items():
        assert [m.path for m in site.members] == [f"{name}.{index}" for index in range(4)]
        assert all(m.transposed == (family == "gpt_oss") for m in site.members)
        assert site.parent == name.partition(".experts")[0]
    shape = written["model.layers.0.mlp.experts.down_proj"].members[0].shape
    inner = 64 if family in ("mixtral", "gpt_oss") else 32
    assert (shape.out_features, shape.in_features) == (32, inner)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_discover_leaves_routers_and_nothing_else(found, family):
    assert found(family).untreated == {
        f"model.layers.{place}.mlp.gate": "a router among 4 experts" for place in (0, 1)
    }


@pytest.mark.parametrize("way", ["eager", "batched_mm", "grouped_mm"])
def test_discover_finds_experts_however_they_are_multiplied(found, make_model, make_batch, way):
    model = make_model("mixtral")
    model.set_experts_implementation(way)
    assert discover(model, make_batch("mixtral")) == found("mixtral")


def test_discover_finds_experts_in_the_middle_of_mapped_memory(found, make_model, make_batch):
    model = make_model("mixtral")
    own = dict(model.named_parameters())
    memory = torch.empty(sum(p.numel() for p in own.values()))
    first = 0
    for parameter in own.values():
        place = memory[first : first + parameter.numel()].view(parameter.shape)
        parameter.data = place.copy_(parameter)
        first += parameter.numel()
    assert discover(model, make_batch("mixtral")) == found("mixtral")


class Routed(nn.Module):
    """A list of experts of which only the first is ever reached."""

    def __init__(self) -> None:
        super().__init__()
        layers = {"gate": (8, 16), "up": (8, 16), "down": (16, 8)}
        self.experts = nn.ModuleList(
            nn.ModuleDict({name: nn.Linear(*shape) for name, shape in layers.items()})
            for _ in range(3)
        )
        for expert in self.experts:
            expert.forward = lambda x, e=expert: e["down"](e["gate"](x) * e["up"](x))
        self.spare = nn.Linear(8, 8)

    def forward(self, x):
        return self.experts[0](x)


def test_discover_makes_sites_of_experts_that_are_not_reached():
    discovery = discover(Routed().eval(), torch.randn(2, 8))
    names = [site.name for site in discovery.sites if not site.is_structure]
    assert not any(site.written_back for site in discovery.sites)
    assert names == [f"experts.{n}.{leaf}" for n in range(3) for leaf in ("gate+up", "down")]
    assert discovery.unreached == {name for name in names if not name.startswith("experts.0")}
    assert [*discovery.untreated] == ["spare"]


def test_discover_makes_sites_of_layers_in_lists_inside_experts_that_are_not_reached():
    model = nn.Module()
    model.experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 8)) for _ in range(3))
    model.forward = lambda x: x + model.experts[1](x)
    discovery = discover(model.eval(), torch.randn(2, 8))
    names = [site.name for site in discovery.sites if not site.is_structure]
    assert {*names} == {f"experts.{n}.{place}" for n in range(3) for place in range(2)}
    assert discovery.unreached == {name for name in names if not name.startswith("experts.1")}
    assert not discovery.untreated


def test_discover_attention_of_torch_is_a_sub_block(found):
    discovery = found("vision")
    sites = {site.name: site for site in discovery.sites}
    attention = sites["blocks.0.attention"]
    assert (attention.kind, attention.output, attention.output_length) == ("attention", "tuple", 2)
    assert sites["blocks.0.attention.in_proj_weight"].parent == "blocks.0.attention"
    assert [*discovery.untreated] == ["positions"]


def test_discover_leaves_no_hooks_when_the_model_fails(make_model):
    model = make_model("conv")
    with pytest.raises(RuntimeError):
        discover(model, torch.randn(2, 5, 8, 8))
    assert not any(module._forward_hooks for module in model.modules())


class PostNorm(nn.Module):
    """A block whose MLP adds its input and normalizes; its attention only normalizes heads."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        self.mlp = nn.ModuleDict({"fc": nn.Linear(8, 8), "norm": nn.LayerNorm(8)})
        self.mlp.forward = lambda x: self.mlp["norm"](x + self.mlp["fc"](x))

    def forward(self, x):
        return self.mlp(x + self.attn(x))


def test_discover_sub_block_with_a_norm_of_the_hidden_width_adds_its_input():
    sites = discover(nn.Sequential(PostNorm(), PostNorm()).eval(), torch.randn(2, 8)).sites
    inside = {s.name: s.residual_inside for s in sites if s.kind in ("attention", "mlp")}
    assert inside == {"0.attn": False, "0.mlp": True, "1.attn": False, "1.mlp": True}
