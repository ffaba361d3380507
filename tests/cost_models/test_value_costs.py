"""What attention with fewer dimensions of heads costs, where its number of heads cannot change."""

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from apportion.cost_models.operators import Given, built_layers, candidate_programs
from apportion.cost_models.profile import measure_profile
from apportion.cost_models.requests import RequestItem
from apportion.cost_models.session import Timing
from apportion.spaces.batches import frozen
from apportion.spaces.discovery import discover
from apportion.spaces.entries import Entry, build_space
from apportion.spaces.grammar import parse_option

WIDTH, HEADS = 64, 4


class Attention(nn.Module):
    """Reads its number of heads from an attribute, as GPT-2 does from its configuration."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.heads = HEADS

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:-1], self.heads, WIDTH // self.heads)
        q, k, v = (y.view(shape).transpose(1, 2) for y in self.qkv(x).split(WIDTH, -1))
        return self.out(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(x)


def test_fewer_dimensions_take_the_time_of_their_layers_and_of_attention() -> None:
    torch.manual_seed(0)
    model, sample = frozen(nn.Sequential(Block(), Block())), torch.randn(2, 8, WIDTH)
    sites = discover(model, sample).sites
    space = build_space(sites, [Entry(("attention:*",), ("keep", "drop", "v50%", "q50%+w8"))])
    assert space.sites[0].width is None and space.sites[0].values is not None
    profile = measure_profile(
        model, space, [RequestItem("forward", batch=2)], sample, known={},
        record=lambda made: None, threads=1, configurations=12,
        timing=Timing(operator_seconds=0.01, model_seconds=0.02),
    )  # fmt: skip
    assert set(profile.implementations["0.attention"]) == {"v50%", "q50%+w8"}
    keep, drop, *halves = profile.rows[0]
    assert keep > drop and min(halves) > drop


def test_what_is_timed_takes_and_gives_as_much_as_the_dense_layers() -> None:
    torch.manual_seed(0)
    model, sample = frozen(nn.Sequential(Block(), Block())), torch.randn(2, 8, WIDTH)
    (site,) = [s for s in discover(model, sample).sites if s.name == "0.attention"]
    given, option = [Given((2, 8, WIDTH), "float32")] * 2, parse_option("v50%+w8")
    program, *_ = candidate_programs(model, site, option, given, 1, 8)
    x = torch.randn(2, 8, WIDTH)
    sizes = []
    for operator in program:
        assert operator.given == given[0] and operator.description["padded"] == [[16, 8]]
        ((layer,),) = built_layers(operator, 1, 0)
        out = layer(x)
        sizes.append(out.shape[-1])
        if out.shape[-1] == 3 * WIDTH:
            values = out[..., 2 * WIDTH :].unflatten(-1, (HEADS, -1))
            assert bool(values[..., :8].any()) and not values[..., 8:].any()
    assert sizes == [3 * WIDTH, WIDTH]


def test_queries_and_keys_are_padded_and_values_and_outputs_timed_as_they_are() -> None:
    torch.manual_seed(0)
    model, sample = frozen(nn.Sequential(Block(), Block())), torch.randn(2, 8, WIDTH)
    (site,) = [s for s in discover(model, sample).sites if s.name == "0.attention"]
    given, option = [Given((2, 8, WIDTH), "float32")] * 2, parse_option("q50%+w8")
    program, *_ = candidate_programs(model, site, option, given, 1, 8)
    fused, out = program
    assert fused.description["padded"] == [[WIDTH, WIDTH // 2]]
    assert "padded" not in out.description
    assert [shape.out_features for shape in fused.shapes] == [2 * WIDTH]
    ((layer,),) = built_layers(fused, 1, 0)
    queries, keys, values = (
        each.unflatten(-1, (HEADS, -1)) for each in layer(torch.randn(8, WIDTH)).split(WIDTH, -1)
    )
    for narrow in (queries, keys):
        assert bool(narrow[..., :8].any()) and not narrow[..., 8:].any()
    assert bool(values.all())


def test_dense_layers_that_hold_zeros_are_the_operators_of_dense_options() -> None:
    torch.manual_seed(0)
    model, sample = frozen(nn.Sequential(Block(), Block())), torch.randn(2, 8, WIDTH)
    sites = {site.name: site for site in discover(model, sample).sites}
    given = [Given((2, 8, WIDTH), "float32")] * 2

    def programs(site: str, text: str) -> dict[str, list[str]]:
        inputs = given[: len(sites[site].groups)]
        made = candidate_programs(model, sites[site], parse_option(text), inputs, 1, 8)
        return {program[0].implementation: [o.key for o in program] for program in made}

    for text, names in (
        ("v50%", {"linear.f32"}),
        ("v50%+w4", {"linear.f32", "linear.bf16"}),
        ("q50%+w4", {"linear.f32", "linear.bf16"}),
    ):
        found = programs("0.attention", text)
        assert {name for name in found if "+" in name} == {f"{name}+zeros" for name in names}
        for name in names:
            rest = text.partition("+")[2] or "f32"
            layers = [programs(f"0.attention.{layer}", rest)[name] for layer in ("qkv", "out")]
            assert found[f"{name}+zeros"] == [key for (key,) in layers]
            assert found[name] != found[f"{name}+zeros"]
