"""Experts as a width: which sub-blocks have it, what a narrower one computes, and which go."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from apportion.errors import InvalidInput
from apportion.spaces.activations import Activations
from apportion.spaces.apply import apply, member_weight
from apportion.spaces.artifact import write
from apportion.spaces.batches import call, frozen, main_tensor
from apportion.spaces.calibration import collect
from apportion.spaces.compressors.treatment import realize_treatment
from apportion.spaces.discovery import discover
from apportion.spaces.entries import Entry, build_space
from apportion.spaces.experts import find_experts
from apportion.spaces.grammar import parse_option
from apportion.spaces.layouts import reordered
from apportion.spaces.loading import load
from apportion.spaces.narrowing import narrowed_copy
from apportion.spaces.parts import treatment_refusal
from apportion.spaces.probing import probe
from apportion.spaces.realization import realize_site
from apportion.spaces.routing import Routing, no_routing
from apportion.spaces.sites import Width
from apportion.spaces.statistics import StatisticsFiles, write_statistics
from apportion.spaces.streaming import portions, stream

HIDDEN, INNER, COUNT, CHOSEN = 8, 6, 5, 2


class Expert(nn.Module):
    """`[n, 8]` -> the same: Mixtral's expert."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.w1, self.w3 = nn.Linear(HIDDEN, INNER, bias), nn.Linear(HIDDEN, INNER, bias)
        self.w2 = nn.Linear(INNER, HIDDEN, bias)

    def forward(self, x):
        return self.w2(nn.functional.silu(self.w1(x)) * self.w3(x))


class Listed(nn.Module):
    """`[batch, tokens, 8]` -> the same: Mixtral's sub-block as transformers 4 had it."""

    def __init__(self, chosen: int = CHOSEN, bias: bool = False) -> None:
        super().__init__()
        self.top_k, self.num_experts = chosen, COUNT
        self.gate = nn.Linear(HIDDEN, COUNT, bias=False)
        self.experts = nn.ModuleList(Expert(bias) for _ in range(COUNT))

    def choose(self, logits):
        gates, chosen = torch.topk(logits.softmax(-1), self.top_k, dim=-1)
        return gates / gates.sum(-1, keepdim=True), chosen

    def forward(self, x):
        rows = x.reshape(-1, HIDDEN)
        gates, chosen = self.choose(self.gate(rows))
        mask = nn.functional.one_hot(chosen, num_classes=self.num_experts).permute(2, 1, 0)
        result = torch.zeros_like(rows)
        for number in range(self.num_experts):
            slot, token = torch.where(mask[number])
            own = self.experts[number](rows[token]) * gates[token, slot, None]
            result.index_add_(0, token, own)
        return result.reshape(x.shape)


class Sparse(Listed):
    """As transformers 5 has it: one module holds the experts as stacks `[experts, out, in]`."""

    def __init__(self, shared: bool = False) -> None:
        super().__init__()
        self.experts = Stack()
        self.shared = Expert() if shared else None

    def forward(self, x):
        rows = x.reshape(-1, HIDDEN)
        gates, chosen = self.choose(self.gate(rows))
        result = self.experts(rows, chosen, gates)
        return (result if self.shared is None else result + self.shared(rows)).reshape(x.shape)


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_experts = COUNT
        self.gate_up = nn.Parameter(torch.randn(COUNT, 2 * INNER, HIDDEN) / 3)
        self.down = nn.Parameter(torch.randn(COUNT, HIDDEN, INNER) / 3)

    def forward(self, rows, chosen, gates):
        result = torch.zeros_like(rows)
        for number in range(self.num_experts):
            token, slot = torch.where(chosen == number)
            gate, up = nn.functional.linear(rows[token], self.gate_up[number]).chunk(2, -1)
            own = nn.functional.linear(nn.functional.silu(gate) * up, self.down[number])
            result = result.index_add(0, token, own * gates[token, slot, None])
        return result


class Corrected(Sparse):
    """DeepSeek-V3's router: a correction that only the choice sees."""

    def __init__(self) -> None:
        super().__init__()
        self.correction = nn.Buffer(torch.linspace(-2, 2, COUNT))

    def choose(self, logits):
        scores = logits.sigmoid()
        chosen = torch.topk(scores + self.correction, self.top_k, dim=-1)[1]
        return scores.gather(1, chosen), chosen


class Block(nn.Module):
    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, x):
        return x + self.mlp(x)


def model_of(make: Callable[[], nn.Module], blocks: int = 2) -> nn.Module:
    torch.manual_seed(0)
    model = frozen(nn.Sequential(*(Block(make()) for _ in range(blocks))))
    for name, value in model.named_parameters():
        if name.endswith("gate.weight"):
            value.mul_(4)
    return model


def tokens(count: int = 40) -> torch.Tensor:
    return torch.randn(2, count // 2, HIDDEN, generator=torch.Generator().manual_seed(1))


FORMS = {
    "listed": Listed,
    "biased": lambda: Listed(bias=True),
    "stacked": Sparse,
    "shared": lambda: Sparse(shared=True),
    "corrected": Corrected,
}


def site_of(model: nn.Module, batch=None, name: str = "1.mlp"):
    found = discover(model, tokens() if batch is None else batch)
    return next(site for site in found.sites if site.name == name)


def routing_of(model: nn.Module, site, *batches) -> Routing:
    return Routing.of(
        collect(model, [stands_for(site)], batches or (tokens(),))[f"{site.name}:experts"]
    )


def stands_for(site):
    space = build_space([site], [Entry(("mlp:*",), ("keep", "c80%"))])
    (stands,) = space.input_sites
    return stands


@pytest.mark.parametrize("form", FORMS)
def test_discover_finds_experts_and_how_many_a_token_needs(form):
    width = site_of(model_of(FORMS[form])).width
    assert (width.unit, width.units, width.experts.least) == ("expert", COUNT, CHOSEN)
    assert width.experts.routers == ("1.mlp.gate.weight",)
    sides = [(cut.side, cut.features, cut.stacks) for cut in width.experts.channels]
    assert sides == {
        "biased": [],
        "listed": [("out", 1, 1), ("out", 1, 1), ("in", 1, 1)],
    }.get(form, [("out", 1, 2), ("in", 1, 1)])
    assert Width.from_json(width.to_json()) == width


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_discover_finds_the_experts_of_transformers_models(make_model, make_batch, family):
    width = site_of(make_model(family), make_batch(family), "model.layers.1.mlp").width
    assert (width.unit, width.units, width.experts.least) == ("expert", 4, 2)
    assert [len(group) for group in width.groups[:4]] == [2, 2, 2, 2]


def test_discover_finds_experts_with_biases_and_turns_of_gate_and_up():
    sizes = dict(hidden_size=32, intermediate_size=24, vocab_size=96, num_hidden_layers=2)
    heads = dict(num_attention_heads=2, num_key_value_heads=1, head_dim=16, num_local_experts=4)
    config = transformers.GptOssConfig(**sizes, **heads, num_experts_per_tok=2)
    torch.manual_seed(0)
    model = frozen(transformers.GptOssForCausalLM(config))
    for value in model.parameters():
        value.add_(0.1 * torch.randn_like(value))
    batch = {"input_ids": torch.arange(24).view(2, 12)}
    width = site_of(model, batch, "model.layers.0.mlp").width
    assert (width.unit, width.experts.least, width.experts.channels) == ("expert", 2, ())
    bias = "model.layers.0.mlp.experts.down_proj_bias"
    assert bias in width.experts.tensors


def dense_without(mlp: nn.Module, x: torch.Tensor, gone: list[int]) -> torch.Tensor:
    """The definition in float64: the router cannot choose what is gone."""
    mlp = mlp.double()
    rows = x.double().reshape(-1, HIDDEN)
    logits = mlp.gate(rows)
    logits[:, gone] = -torch.inf
    if isinstance(mlp, Corrected):
        mlp.correction[gone] = -torch.inf
    gates, chosen = mlp.choose(logits)
    result = torch.zeros_like(rows)
    for token, (own, numbers) in enumerate(zip(gates, chosen.tolist(), strict=True)):
        for gate, number in zip(own, numbers, strict=True):
            result[token] += gate * expert_of(mlp, number)(rows[token])
    if getattr(mlp, "shared", None) is not None:
        result += mlp.shared(rows)
    return result.reshape(x.shape)


def expert_of(mlp: nn.Module, number: int) -> Callable[[torch.Tensor], torch.Tensor]:
    if isinstance(mlp.experts, nn.ModuleList):
        return mlp.experts[number]
    up, down = mlp.experts.gate_up[number], mlp.experts.down[number]

    def run(row):
        gate, value = (up @ row).chunk(2)
        return down @ (nn.functional.silu(gate) * value)

    return run


@pytest.mark.parametrize("form", FORMS)
def test_narrowed_sub_block_is_the_dense_one_that_cannot_choose_the_others(form):
    model, x = model_of(FORMS[form]), tokens()
    site = site_of(model)
    for size in (2, 3, 4):
        for kept in itertools.combinations(range(COUNT), size):
            narrow = narrowed_copy(model, site, kept).double()
            gone = [number for number in range(COUNT) if number not in kept]
            expected = dense_without(model_of(FORMS[form])[1].mlp, x, gone)
            torch.testing.assert_close(narrow(x.double()), expected, rtol=1e-10, atol=1e-12)
    assert len(model[1].mlp.gate.weight) == COUNT


@pytest.mark.parametrize("form", FORMS)
def test_routing_is_that_of_the_definition(form):
    model, x = model_of(FORMS[form]), tokens()
    site = site_of(model)
    found = routing_of(model, site, x[:1], x[1:])
    mlp = model_of(FORMS[form])[1].mlp.double()
    with torch.no_grad():
        rows = model_of(FORMS[form]).double()[0](x.double()).reshape(-1, HIDDEN)
        logits = mlp.gate(rows)
        counts, added = torch.zeros(2, COUNT, dtype=torch.float64)
        for row, gates, chosen in zip(rows, *mlp.choose(logits), strict=True):
            for gate, number in zip(gates, chosen.tolist(), strict=True):
                counts[number] += 1
                added[number] += gate * expert_of(mlp, number)(row).norm()
    assert found.tokens == len(rows) and found.counts.equal(counts)
    torch.testing.assert_close(found.added, added, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.logits, logits.T @ logits, rtol=1e-4, atol=1e-4)


def test_calibration_of_experts_changes_nothing_that_others_see():
    model = model_of(Listed)
    entries = [Entry(("*",), ("dense", "w4")), Entry(("*",), ("keep", "c80%"), True)]
    space = build_space(discover(model, tokens()).sites, entries)
    weights = [site for site in space.input_sites if site.kind != "experts"]
    alone, both = (collect(model, s, [tokens()]) for s in (weights, space.input_sites))
    assert set(both) - set(alone) == {"0.mlp:experts", "1.mlp:experts"}
    for name, seen in alone.items():
        assert both[name].tokens == seen.tokens
        assert both[name].second_moment.equal(seen.second_moment)


@pytest.mark.parametrize("form", ["listed", "shared"])
def test_bank_entry_of_experts_comes_from_the_statistics_of_their_block(form, tmp_path):
    model, batches = model_of(FORMS[form]), tokens(80).chunk(2)
    found = discover(model, batches[0])
    blocks = [site for site in found.sites if site.kind == "block"]
    space = build_space(found.sites, [Entry(("mlp:*",), ("keep", "c60%", "drop:mean"))])
    whole, files = collect(model, space.input_sites, batches), dict[str, Path]()

    def keep(portion, sums):
        path = tmp_path / f"{portion.block}.safetensors"
        write_statistics(path, sums)
        files.update(dict.fromkeys(sums, path))

    wanted = portions(space.input_sites, blocks, space.mean_sites)
    assert stream(model, blocks, wanted, batches, Activations(tmp_path), keep) is None
    statistics = StatisticsFiles(files)
    for site in space.sites:
        seen = statistics.of(f"{site.name}:experts")
        assert seen.second_moment.equal(whole[f"{site.name}:experts"].second_moment)
        stored = realize_site(model, site, parse_option("c60%"), statistics, "float32", 8)
        best = Routing.of(seen).added.argsort()[2:].sort().values
        assert stored.kept == tuple(best.tolist())
        assert len(stored.weights) == len(site.width.members(3))


def twins(form) -> nn.Module:
    """Each token goes to one expert; two experts are alike but for the order of their channels."""
    model = model_of(FORMS[form])
    mlp = model[0].mlp
    mlp.top_k = 1
    mlp.gate.weight.copy_(torch.eye(COUNT, HIDDEN) * -9)
    mlp.gate.weight[0] = torch.tensor([30.0, 1, 0, 0, 0, 0, 0, 0])
    mlp.gate.weight[3] = torch.tensor([30.0, -1, 0, 0, 0, 0, 0, 0])
    order = torch.randperm(INNER, generator=torch.Generator().manual_seed(3)).tolist()
    site = site_of(model, name="0.mlp")
    firsts, thirds = site.width.groups[0], site.width.groups[3]
    for one, three, cut in zip(firsts, thirds, site.width.experts.channels, strict=True):
        matrix = reordered(member_weight(model, one.member), cut, order)
        member_weight(model, three.member).copy_(matrix)
    return model


def treated(model, site, text, statistics):
    space = build_space([site], [Entry(("mlp:*",), ("keep", text))])
    option = parse_option(text)
    weights = [member_weight(model, m).float() for group in site.groups for m in group]
    stored = realize_treatment(weights, site.width, option, [statistics], "float32")
    apply(model, space, {site.name: text}, lambda *_: stored, {})
    return stored


@pytest.mark.parametrize("form", ["listed", "stacked"])
def test_merging_experts_that_compute_the_same_loses_nothing(form):
    model, dense = twins(form), twins(form)
    x = tokens(400)
    x[..., 0] = torch.where(torch.arange(200) % 6 == 0, 3.0, -0.1)  # few go to the twins
    site = site_of(model, name="0.mlp")
    seen = collect(model, [stands_for(site)], [x])["0.mlp:experts"]
    counts = Routing.of(seen).counts
    assert min(counts[0], counts[3]) > 0 and counts.argmin() in (0, 3)
    stored = treated(model, site, "c80%:merge", seen)
    assert len({0, 3} - set(stored.kept)) == 1
    torch.testing.assert_close(model[0](x), dense[0](x), rtol=1e-5, atol=1e-5)


def test_dropping_takes_what_adds_least_and_leaves_the_weights_of_the_rest():
    model, dense = model_of(Listed), model_of(Listed)
    site = site_of(model)
    seen = collect(model, [stands_for(site)], [tokens()])["1.mlp:experts"]
    least = int(Routing.of(seen).added.argmin())
    stored = treated(model, site, "c80%", seen)
    assert stored.kept == tuple(number for number in range(COUNT) if number != least)
    for place, number in enumerate(stored.kept):
        new, old = model[1].mlp.experts[place], dense[1].mlp.experts[number]
        assert all(a.equal(b) for a, b in zip(new.parameters(), old.parameters(), strict=True))


def test_method_that_needs_statistics_is_refused_without_them():
    model = model_of(Listed)
    with pytest.raises(
        InvalidInput, match="drop needs calibration statistics .* ask for magnitude"
    ):
        treated(model, site_of(model), "c80%:drop", None)


def test_experts_that_no_token_came_to_go_by_their_norms():
    model = model_of(Listed)
    norms = [
        sum(float(p.double().norm().log()) for p in expert.parameters())
        for expert in model[1].mlp.experts
    ]
    stored = treated(model, site_of(model), "c80%:merge", no_routing(COUNT))
    assert set(range(COUNT)) - set(stored.kept) == {norms.index(min(norms))}


@pytest.mark.parametrize(
    "form, option, reason",
    [
        ("listed", "c80%", None),
        ("listed", "c80%:merge+w4", None),
        ("stacked", "c40%", None),
        ("listed", "c80%:obs", "obs does not say which experts go; drop, merge, magnitude do"),
        ("listed", "c80%:taylor", "taylor does not say which experts go; drop, merge, magnitude"),
        ("listed", "c30%", "keeps 1 of 5 experts and a token is given to 2; at least c40%"),
        ("listed", "c10%", "keeps 0 of 5 experts and a token is given to 2; at least c40%"),
        ("biased", "c80%:merge", "merge puts the channels of an expert into another one's order"),
        ("listed", "c80%+w4:gptq", "what follows c of experts is done without statistics"),
        ("stacked", "c80%+w8a8", "what enters the layer cannot be quantized"),
    ],
)
def test_options_that_do_not_fit_experts_say_why(form, option, reason):
    width = site_of(model_of(FORMS[form])).width
    told = treatment_refusal(parse_option(option), width, 8)
    assert told is None if reason is None else reason in told


def test_heads_and_channels_have_no_methods_of_experts(make_model, make_batch):
    width = site_of(make_model("llama"), make_batch("llama"), "model.layers.1.mlp").width
    told = treatment_refusal(parse_option("c50%:merge"), width, 8)
    methods = "obs, wanda, chip, taylor, first, magnitude"
    assert told == f"merge does not say which channels go; {methods} do"


class All(Listed):
    def __init__(self) -> None:
        super().__init__(chosen=COUNT)


class Grouped(Listed):
    """Chooses the best half of the experts first, by where they stand."""

    def choose(self, logits):
        half = logits.shape[-1] // 2
        first = logits[:, :half].sum(-1, keepdim=True) > logits[:, half:].sum(-1, keepdim=True)
        near = torch.arange(logits.shape[-1]) < half
        return super().choose(logits - 99.0 * (first != near))


class Counted(Listed):
    """Takes the number of experts from a settings object."""

    def __init__(self) -> None:
        super().__init__()
        self.settings = {"experts": COUNT}
        del self.num_experts

    def __getattr__(self, name):
        return self.settings["experts"] if name == "num_experts" else super().__getattr__(name)


class Squashed(Listed):
    def forward(self, x):
        return super().forward(x).tanh()


class Inside(Sparse):
    """Stacks that the sub-block itself multiplies by."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up, self.down = self.experts.gate_up, self.experts.down
        self.num_experts = COUNT
        del self.experts

    def forward(self, x):
        rows = x.reshape(-1, HIDDEN)
        gates, chosen = self.choose(self.gate(rows))
        return Stack.forward(self, rows, chosen, gates).reshape(x.shape)


@pytest.mark.parametrize(
    "block, reason",
    [
        (All, "a token is given to all, or it takes their number from elsewhere"),
        (Grouped, "experts it does not give what it gives without the others"),
        (Counted, "it takes their number from elsewhere than its weights"),
        (Squashed, "their outputs are not multiplied by a gate and summed up"),
        (Inside, "their module is not called with the numbers and gates of a token's own"),
    ],
)
def test_sub_block_whose_experts_cannot_be_left_out_says_why(block, reason):
    model, x = model_of(block), tokens()
    found = discover(model, x)
    inside = [site.members for site in found.sites if site.parent == "1.mlp"]
    groups = [[replace(m, module=m.module[len("1.mlp.") :]) for m in group] for group in inside]
    told = find_experts(model[1].mlp, groups, probe(model, x).calls["1.mlp"])
    assert reason in told
    # Experts in a list may have channels all the same.
    assert not isinstance(model[1].mlp, Sparse) or found.fixed_widths["1.mlp"] == told


@pytest.mark.parametrize("form", ["biased", "shared"])
@pytest.mark.parametrize("text", ["c60%", "c80%+w4"])
def test_artifact_of_fewer_experts_is_loaded_as_it_was_applied(form, text, make_plan, tmp_path):
    model = model_of(FORMS[form])
    space = build_space([site_of(model)], [Entry(("mlp:*",), ("keep", text))])
    plan = make_plan(model, space, {"1.mlp": text})
    source = {"kind": "python", "source": "m:f", "revision": "", "dtype": "float32"}
    write(tmp_path / "out", model, plan, source, {})
    applied = model_of(FORMS[form])
    apply(applied, space, plan.configuration, plan.stored, plan.implementations)
    loaded = load(tmp_path / "out", model=lambda: model_of(FORMS[form]))
    assert main_tensor(call(loaded, tokens())).equal(main_tensor(call(applied, tokens())))
    assert len(loaded[1].mlp.gate.weight) == int(text[1]) * COUNT // 10
