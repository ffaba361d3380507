"""Choice blocks: found as sites, switched, priced, and exported with what was chosen alone."""

import copy
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import apportion
from apportion.cost_models.profile import measure_profile
from apportion.cost_models.requests import RequestItem
from apportion.cost_models.session import Timing
from apportion.cost_models.static import bits, resident_cost, weight_bytes
from apportion.errors import InvalidInput
from apportion.spaces.apply import apply
from apportion.spaces.artifact import TENSORS, write
from apportion.spaces.batches import frozen
from apportion.spaces.choice import Choice
from apportion.spaces.discovery import discover
from apportion.spaces.entries import Entry, build_space

WIDTH = 16
OPTIONS = ("op:wide", "op:narrow", "op:skip")


def alternatives() -> dict[str, nn.Module]:
    wide = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.ReLU(), nn.Linear(4 * WIDTH, WIDTH))
    return {"wide": wide, "narrow": nn.Linear(WIDTH, WIDTH), "skip": nn.Identity()}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.mlp = Choice(alternatives())

    def forward(self, x):
        return x + self.mlp(self.norm(x))


class Net(nn.Module):
    """`[batch, 16]` -> `[batch, 4]`: a choice block alone, and one in each of two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = Choice(alternatives())
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x):
        x = self.stem(input=x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return frozen(Net())


@pytest.fixture
def sample() -> torch.Tensor:
    return torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def space(net, sample):
    entries = [
        Entry(("choice:*",), OPTIONS),
        Entry(("head",), ("dense", "w4g8")),
        Entry(("block:*",), ("keep", "drop")),
    ]
    return build_space(discover(net, sample).sites, entries)


def by_hand(net: nn.Module, names: dict[str, str]) -> nn.Module:
    """The net with plain alternatives in the places of its choice blocks."""
    built = copy.deepcopy(net)
    for path in ("stem", "blocks.0.mlp", "blocks.1.mlp"):
        choice = net.get_submodule(path)
        built.set_submodule(path, copy.deepcopy(choice.alternatives[names.get(path, "wide")]))
    return built


CHOSEN = {"stem": "skip", "blocks.0.mlp": "narrow"}
CONFIGURATIONS = [
    {},
    {"stem": "op:skip", "blocks.0.mlp": "op:narrow"},
    {"stem": "op:narrow", "head": "w4g8", "blocks.1.mlp": "op:skip"},
    {"blocks.0": "drop", "stem": "op:narrow"},
]


def test_discover_finds_choice_blocks_where_they_stand(net, sample):
    found = discover(net, sample)
    assert [(site.name, site.kind, site.parent) for site in found.sites] == [
        ("stem", "choice", None),
        ("blocks.0", "block", None),
        ("blocks.0.mlp", "choice", "blocks.0"),
        ("blocks.1", "block", None),
        ("blocks.1.mlp", "choice", "blocks.1"),
        ("head", "linear", None),
    ]
    assert found.sites[0].choices == ("wide", "narrow", "skip")


def test_discover_says_why_layers_of_alternatives_are_no_sites(net, sample):
    untreated = discover(net, sample).untreated
    assert len(untreated) == 9
    assert "choice block" in untreated["stem.alternatives.wide.0"]
    assert "choice block" in untreated["blocks.1.mlp.alternatives.narrow"]


def test_discover_of_a_row_of_choice_blocks_takes_none_for_a_block(sample):
    model = frozen(nn.Sequential(Choice(alternatives()), Choice(alternatives())))
    assert [site.kind for site in discover(model, sample).sites] == ["choice", "choice"]


def test_discover_refuses_choice_blocks_that_cannot_be_stored_apart(sample):
    shared = nn.Linear(WIDTH, WIDTH)
    tied = Choice({"once": shared, "twice": nn.Sequential(shared, nn.ReLU())})
    nested = Choice({"inner": Choice(alternatives()), "skip": nn.Identity()})
    found = discover(frozen(nn.Sequential(tied, nested)), sample)
    assert [site.name for site in found.sites] == ["1"]
    assert "shares a weight" in found.untreated["0"]
    assert "lies in a choice block" in found.untreated["1.alternatives.inner"]


@pytest.mark.parametrize(
    ("names", "told"),
    [(["a"], "at least 2"), (["a", "b.c"], '"b.c"'), (["a", "keys"], '"keys"')],
)
def test_choice_refuses_what_no_option_can_name(names, told):
    with pytest.raises(InvalidInput, match=told):
        Choice({name: nn.Identity() for name in names})


def test_space_has_the_first_alternative_as_neutral(space):
    assert space.texts[space.index("stem")] == OPTIONS
    assert space.canonical({"blocks.0": "drop", "blocks.0.mlp": "op:skip"}) == space.canonical(
        {"blocks.0": "drop"}
    )


def test_space_without_the_first_in_the_entry_still_begins_with_it(net, sample):
    space = build_space(discover(net, sample).sites, [Entry(("stem",), ("op:skip",))])
    assert space.texts == (("op:wide", "op:skip"),)


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        (Entry(("stem",), ("op:narow",)), "op:skip; nearest: op:narrow"),
        (Entry(("stem",), ("w4g8",)), "op:NAME for choice blocks"),
        (Entry(("head",), ("op:wide",)), "names only sites that no option here is for"),
        (Entry(("block:*",), ("op:wide",)), "names only sites that no option here is for"),
    ],
)
def test_space_refuses_options_of_another_kind(net, sample, entry, told):
    with pytest.raises(InvalidInput, match=told):
        build_space(discover(net, sample).sites, [entry])


def test_apply_runs_and_holds_only_what_was_chosen(net, sample, space, make_plan):
    plan = make_plan(net, space, CONFIGURATIONS[1])
    built = copy.deepcopy(net)
    apply(built, space, plan.configuration, plan.stored, plan.implementations)
    with torch.no_grad():
        assert torch.equal(built(sample), by_hand(net, CHOSEN)(sample))
    assert sum(p.numel() for p in built.parameters()) == sum(
        p.numel() for p in by_hand(net, CHOSEN).parameters()
    )


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_artifact_gives_the_same_output_and_the_bytes_that_were_priced(
    net, sample, space, make_plan, tmp_path, configuration
):
    plan = make_plan(copy.deepcopy(net), space, configuration)
    source = {"kind": "python", "source": "there", "revision": "1", "dtype": "float32"}
    write(tmp_path / "artifact", net, plan, source, {})
    config, cost = space.config(configuration), weight_bytes(net, space)
    priced = cost.base + sum(
        cost.rows[place, option]
        for place, option in enumerate(config)
        if not space.void(config, place)
    )
    tensors = load_file(tmp_path / "artifact" / TENSORS)
    assert sum(tensor.nbytes for tensor in tensors.values()) == priced
    apply(net, space, plan.configuration, plan.stored, plan.implementations)
    loaded = apportion.load(tmp_path / "artifact", model=Net)
    with torch.no_grad():
        assert torch.equal(loaded(sample), net(sample))
    assert set(loaded.stem.names) == {space.canonical(configuration)["stem"][3:]}


def test_artifact_for_a_model_without_the_alternative_is_refused(net, space, make_plan, tmp_path):
    source = {"kind": "python", "source": "there", "revision": "1", "dtype": "float32"}
    write(tmp_path / "artifact", net, make_plan(net, space, CONFIGURATIONS[1]), source, {})

    def other() -> nn.Module:
        built = Net()
        del built.stem.alternatives["skip"]
        return built

    with pytest.raises(InvalidInput, match="no alternative skip; there are wide, narrow"):
        apportion.load(tmp_path / "artifact", model=other)


def test_static_costs_of_a_space_of_choice_blocks_alone(net, sample):
    space = build_space(discover(net, sample).sites, [Entry(("choice:*",), OPTIONS)])
    assert not bits(net, space).rows.any()
    held, stored = resident_cost(net, space, {}), weight_bytes(net, space)
    assert (held.rows == stored.rows).all() and held.base == stored.base
    wide, narrow = 4 * (2 * 4 * WIDTH * WIDTH + 5 * WIDTH), 4 * (WIDTH * WIDTH + WIDTH)
    assert stored.rows[0].tolist() == [wide, narrow, 0]


def test_profile_times_each_kind_of_alternative_once(net, sample, space):
    store: dict = {}
    profile = measure_profile(
        net, space, [RequestItem("forward", batch=2)], sample, threads=1, known={},
        record=store.update, timing=Timing(0.005, 0.01), configurations=4,
    )  # fmt: skip
    for place in (space.index("stem"), space.index("blocks.0.mlp"), space.index("blocks.1.mlp")):
        assert min(profile.rows[place]) == 0
    assert sum(":op:" in str(stored) for stored in store.values()) >= 2
    first, second = (profile.rows[space.index(f"blocks.{number}.mlp")] for number in (0, 1))
    assert first == second
    again = measure_profile(
        net, space, [RequestItem("forward", batch=2)], sample, threads=1, known=store,
        record=lambda batch: pytest.fail("measured again"), timing=None, configurations=4,
    )  # fmt: skip
    assert replace(again, fingerprint=profile.fingerprint) == profile
