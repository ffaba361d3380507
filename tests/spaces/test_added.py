"""What a sub-block adds: its mean equals a float64 oracle, and stands in for the sub-block."""

import pytest
import torch
from torch import nn

from apportion.errors import InvalidInput
from apportion.spaces.activations import Activations
from apportion.spaces.added import Added, adding
from apportion.spaces.apply import Dropped
from apportion.spaces.bank import Bank
from apportion.spaces.batches import call, frozen, main_tensor
from apportion.spaces.calibration import collect
from apportion.spaces.discovery import discover
from apportion.spaces.entries import Entry, build_space
from apportion.spaces.grammar import parse_option
from apportion.spaces.realization import realize_site
from apportion.spaces.statistics import StatisticsFiles, write_statistics
from apportion.spaces.streaming import portions, stream

MEAN = parse_option("drop:mean")
# A tuple, a tensor, a module that adds its input itself, maps of a convolution.
PLACES = [
    ("llama", "model.layers.1.self_attn"),
    ("llama", "model.layers.1.mlp"),
    ("llama", "model.layers.1"),
    ("gpt2", "transformer.h.0.attn"),
    ("bert", "bert.encoder.layer.1.attention"),
    ("vision", "blocks.0.mlp"),
    ("conv", "blocks.1"),
]


def space_of(model, batch, options=("keep", "drop", "drop:mean")):
    entries = [Entry(("block:*", "attention:*", "mlp:*"), options, skip_unfit=True)]
    return build_space(discover(model, batch).sites, entries)


def batches_of(make_batch, family):
    """Batches of different lengths, where the model takes tokens."""
    if family in ("conv", "vision"):
        return [make_batch(family), 2 * make_batch(family) + 1]
    return [make_batch(family), make_batch(family, 7)]


@torch.no_grad()
def watched(model, site, batch):
    """Input and output of a module in one pass, copied."""
    seen = []
    module = model.get_submodule(site.name)
    take = lambda _, args, keywords: seen.append(  # noqa: E731
        next(a for a in (*args, *keywords.values()) if isinstance(a, torch.Tensor)).clone()
    )
    give = lambda _, args, output: seen.append(main_tensor(output).clone())  # noqa: E731
    handles = module.register_forward_pre_hook(take, with_kwargs=True)
    more = module.register_forward_hook(give)
    call(model, batch)
    handles.remove()
    more.remove()
    return seen


def rows(hidden, site):
    """[tokens, features] of what a module takes or returns, in float64."""
    if len(site.constant) == 1:
        return hidden.reshape(-1, hidden.shape[-1]).double()
    return hidden.movedim(1, -1).reshape(-1, hidden.shape[1]).double()


def added_rows(model, site, batches):
    parts = []
    for batch in batches:
        given, returned = watched(model, site, batch)
        taken = rows(given, site) if site.residual_inside else 0
        parts.append(rows(returned, site) - taken)
    return torch.cat(parts)


@pytest.fixture
def fitted(make_model, make_batch):
    """family, name of a site -> the model, its site, the batches and what the site adds."""

    def build(family, name):
        model, batches = make_model(family), batches_of(make_batch, family)
        space = space_of(model, batches[0])
        site = space.sites[space.index(name)]
        return model, site, batches, collect(model, [], batches, added=[site])[name]

    return build


@pytest.mark.parametrize("family, name", PLACES)
def test_mean_equals_the_float64_mean_of_what_was_added(fitted, family, name):
    model, site, batches, found = fitted(family, name)
    expected = added_rows(model, site, batches)
    assert found.tokens == len(expected)
    mean = found.mean(torch.float64)
    assert mean.shape == site.constant
    torch.testing.assert_close(mean.flatten(), expected.mean(0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("family, name", PLACES)
def test_mean_removes_its_own_square_from_the_error_of_a_drop(fitted, family, name):
    model, site, batches, found = fitted(family, name)
    added, mean = added_rows(model, site, batches), found.mean(torch.float32)
    dropped, replaced = Dropped(site, nn.Identity()), Dropped(site, nn.Identity(), mean)
    errors = []
    for module in (dropped, replaced):
        lost = torch.zeros(())
        for batch in batches:
            given, returned = watched(model, site, batch)
            lost = (
                lost
                + (rows(returned, site) - rows(main_tensor(module(given)), site)).square().sum()
            )
        errors.append(lost.item())
    gain = len(added) * mean.double().square().sum().item()
    assert errors[1] < errors[0]
    assert errors[0] - errors[1] == pytest.approx(gain, rel=1e-4)


@pytest.mark.parametrize("family, name", PLACES)
def test_what_stands_in_gives_the_constant_exactly(fitted, family, name):
    model, site, batches, found = fitted(family, name)
    constant = found.mean(torch.float32)
    given, _ = watched(model, site, batches[0])
    output = Dropped(site, model.get_submodule(name), constant)(given)
    assert isinstance(output, tuple) is (site.output == "tuple")
    base = given if site.residual_inside else torch.zeros_like(given)
    assert torch.equal(main_tensor(output), base + constant)
    if isinstance(output, tuple):
        assert len(output) == site.output_length and not any(
            each is not None for each in output[1:]
        )


class Kept(nn.Module):
    """A residual around some layers."""

    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x):
        return x + self.layers(x)


class Swapped(nn.Module):
    """Layers that take the last dimension as channels, or the other way round."""

    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x):
        return self.layers(x.movedim(1, -1)).movedim(-1, 1)


SHAPES = {
    "tokens": (lambda: [nn.Linear(8, 8)], (5, 8), (8,)),
    "rows": (lambda: [nn.Linear(8, 8)], (8,), (8,)),
    "maps": (lambda: [nn.Conv2d(8, 8, 3, padding=1)], (8, 4, 6), (8, 1, 1)),
    "signals": (lambda: [nn.Conv1d(8, 8, 3, padding=1)], (8, 6), (8, 1)),
    "maps with a matrix of channels": (
        lambda: [nn.Conv2d(8, 8, 1), Swapped(nn.Linear(8, 8))],
        (8, 4, 8),
        (8, 1, 1),
    ),
    "tokens, as many as a convolution has channels": (
        lambda: [nn.Linear(6, 10), Swapped(nn.Conv1d(10, 10, 1)), nn.Linear(10, 6)],
        (10, 6),
        (6,),
    ),
    "maps with features last": (lambda: [nn.Linear(6, 6)], (4, 4, 6), (6,)),
}


@pytest.mark.parametrize("case", SHAPES)
def test_constant_has_a_value_for_each_feature_or_channel(case):
    layers, given, expected = SHAPES[case]
    model = frozen(nn.Sequential(Kept(*layers()), Kept(*layers())))
    sites = discover(model, torch.randn(3, *given)).sites
    assert [site.constant for site in sites if site.kind == "block"] == [expected] * 2


class Overwriting(nn.Module):
    """Adds its input itself, and writes into it."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x):
        return x.add_(self.layer(x))


def test_mean_of_a_module_that_writes_into_its_input():
    torch.manual_seed(0)
    model = frozen(nn.Sequential(Overwriting(), Overwriting()))
    batch = torch.randn(5, 6)
    space = space_of(model, batch.clone())
    expected = model[0].layer(batch).double().mean(0)
    found = collect(model, [], [batch.clone()], added=[space.sites[0]])["0"]
    torch.testing.assert_close(found.mean(torch.float64), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "conv", "vision"])
def test_stream_sums_what_an_ordinary_pass_does(make_model, make_batch, tmp_path, family):
    model, batches = make_model(family), batches_of(make_batch, family)
    sites = discover(model, batches[0]).sites
    space = space_of(model, batches[0])
    blocks = [site for site in sites if site.kind == "block"]
    found = {}
    wanted = portions(sites, blocks, space.mean_sites)
    reason = stream(
        model, blocks, wanted, batches, Activations(tmp_path), lambda _, sums: found.update(sums)
    )
    assert reason is None and space.mean_sites
    together = collect(model, sites, batches, added=space.mean_sites)
    assert found.keys() == together.keys()
    for site in space.mean_sites:
        assert found[site.name].hash == together[site.name].hash


def test_adding_says_what_never_ran_and_what_is_not_finite(make_model, make_batch):
    model, batch = make_model("llama"), make_batch("llama")
    site = space_of(model, batch).mean_sites[0]
    with pytest.raises(InvalidInput, match="model.layers.0 never runs"), adding(model, [site]):
        pass
    model.model.embed_tokens.weight[batch["input_ids"][0, 0]] = torch.nan
    with pytest.raises(InvalidInput, match="what model.layers.0 adds is not finite"):
        collect(model, [], [batch], added=[site])


def test_mean_that_its_dtype_cannot_hold_is_refused():
    with pytest.raises(InvalidInput, match="too large"):
        Added(torch.tensor([1e6], dtype=torch.float64), 2).mean(torch.float16)


@pytest.mark.parametrize("family, name", PLACES)
def test_constant_goes_through_file_and_bank_to_the_bit(fitted, tmp_path, family, name):
    model, site, _, found = fitted(family, name)
    write_statistics(tmp_path / "statistics", {name: found})
    files = StatisticsFiles({name: tmp_path / "statistics"})
    assert files.added(name).hash == found.hash
    stored = realize_site(model, site, MEAN, files, "bfloat16", 8)
    assert torch.equal(stored.constant, found.mean(torch.bfloat16)) and not stored.weights
    bank = Bank(tmp_path / "bank")
    bank.put("a1", stored)
    read = bank.get("a1")
    assert torch.equal(read.constant, stored.constant) and read.constant.dtype == torch.bfloat16
    assert read.weights == () and read.kept is None
