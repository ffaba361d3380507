"""Entries of the bank: a matrix in a stack is compressed as it is in a layer of its own."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from apportion.spaces.batches import frozen
from apportion.spaces.calibration import collect
from apportion.spaces.compressors.compose import realize
from apportion.spaces.degenerate import degeneracy
from apportion.spaces.discovery import discover
from apportion.spaces.grammar import parse_option
from apportion.spaces.realization import realize_options, realize_site
from apportion.spaces.statistics import StatisticsFiles, write_statistics

IN, OUT, EXPERTS, TOKENS, UNREACHED = 16, 48, 4, 120, 3
OPTIONS = "w3g16:gptq w3g16 s50%:wanda 2:4:sparsegpt w4:awq r50% s50%+w4:gptq w3+r2".split()


class Stacked(nn.Module):
    """Each token goes to an expert, by its first input; none to the last one."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.randn(EXPERTS, OUT, IN))

    def forward(self, x):
        chosen, output = route(x), x.new_zeros(len(x), OUT)
        for place in chosen.unique():
            output[chosen == place] = F.linear(x[chosen == place], self.experts[place])
        return output


class Listed(nn.Module):
    """The same with a layer for each expert."""

    def __init__(self, experts) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(IN, OUT, bias=False) for _ in range(EXPERTS))
        for layer, weight in zip(self.experts, experts, strict=True):
            layer.weight.data = weight

    def forward(self, x):
        chosen, output = route(x), x.new_zeros(len(x), OUT)
        for place, layer in enumerate(self.experts):
            output[chosen == place] = layer(x[chosen == place])
        return output


def route(x):
    return torch.bucketize(x[:, 0].contiguous(), torch.tensor([-0.5, 0.5]))


def inputs():
    generator = torch.Generator().manual_seed(2)
    mix = torch.randn(IN, IN, generator=generator)
    return torch.randn(TOKENS, IN, generator=generator) @ mix


def calibrated(model, x, file):
    """Its weight sites, and the statistics of their inputs, from a file."""
    sites = [site for site in discover(model, x).sites if not site.is_structure]
    sums = collect(model, sites, [x, -x])
    write_statistics(file, sums)
    return sites, StatisticsFiles(dict.fromkeys(sums, file))


@pytest.fixture(scope="module")
def stacked(tmp_path_factory):
    """A model with its one site, and statistics of it."""
    torch.manual_seed(0)
    model = frozen(Stacked())
    file = tmp_path_factory.mktemp("stacked") / "statistics"
    (site,), statistics = calibrated(model, inputs(), file)
    return model, site, statistics


@pytest.fixture(scope="module")
def listed(stacked, tmp_path_factory):
    """The same weights in layers: the model, its sites by their names, and statistics."""
    model = frozen(Listed(stacked[0].experts))
    file = tmp_path_factory.mktemp("listed") / "statistics"
    sites, statistics = calibrated(model, inputs(), file)
    return model, {site.name: site for site in sites}, statistics


def made(model, site, text, statistics):
    option = parse_option(text)
    return realize_site(model, site, option, statistics, "float32", 4).weights


def assert_same(one, other):
    assert (one.format, one.shape) == (other.format, other.shape)
    assert one.tensors.keys() == other.tensors.keys()
    assert all(torch.equal(one.tensors[name], other.tensors[name]) for name in one.tensors)


@pytest.mark.parametrize("text", OPTIONS)
def test_expert_in_a_stack_is_compressed_as_a_layer_is(stacked, listed, text):
    model, site, statistics = stacked
    layers, layer_sites, seen = listed
    found = made(model, site, text, statistics)
    assert len(found) == EXPERTS
    for place, expert in enumerate(found):
        (layer,) = made(layers, layer_sites[f"experts.{place}"], text, seen)
        assert_same(expert, layer)


@pytest.mark.parametrize("text", ["w3g16:gptq", "w3g16"])
def test_expert_that_no_token_reaches_is_rounded_to_nearest_and_told(stacked, text):
    model, site, statistics = stacked
    names, option = site.input_names, parse_option(text)
    pairs = zip(names, model.experts, strict=True)
    told = [degeneracy([weight], statistics.of(name), [option]) for name, weight in pairs]
    assert told == [None, None, None, "no calibration data entered it"]
    expert = made(model, site, text, statistics)[UNREACHED]
    weight, shape = model.experts[UNREACHED], site.members[UNREACHED].shape
    assert_same(expert, realize(weight, shape, parse_option("w3g16:rtn"), None, "float32"))


def test_statistics_of_one_expert_change_no_other(stacked, tmp_path):
    model, site, statistics = stacked
    sums = {name: statistics.of(name) for name in site.input_names}
    other = made(model, site, "w3g16:gptq", statistics)
    sums["experts.0"].second_moment[:] = sums["experts.1"].second_moment
    write_statistics(tmp_path / "changed", sums)
    files = StatisticsFiles(dict.fromkeys(sums, tmp_path / "changed"))
    changed = made(model, site, "w3g16:gptq", files)
    same = [
        all(torch.equal(one.tensors[name], two.tensors[name]) for name in one.tensors)
        for one, two in zip(other, changed, strict=True)
    ]
    assert same == [False, True, True, True]


def test_options_of_a_stack_share_one_factorization_of_each_expert(stacked, monkeypatch):
    model, site, statistics = stacked
    options = [parse_option(text) for text in ("w3g16:gptq", "w4:gptq", "w2g16:gptq")]
    factorized, factorize = [], torch.linalg.cholesky_ex

    def count(*args, **keywords):
        factorized.append(args[0])
        return factorize(*args, **keywords)

    monkeypatch.setattr("torch.linalg.cholesky_ex", count)
    for option in options:
        realize_site(model, site, option, statistics, "float32", 4)
    apart = len(factorized)
    shared = [*realize_options(model, site, options, statistics, "float32", 4)]
    assert 0 < len(factorized) - apart == apart // 3
    for option, found in zip(options, shared, strict=True):
        expected = realize_site(model, site, option, statistics, "float32", 4)
        for one, other in zip(found.weights, expected.weights, strict=True):
            assert_same(one, other)
