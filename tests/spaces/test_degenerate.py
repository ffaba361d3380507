"""What is said of weights and inputs that are degenerate, and what calibration makes of them."""

import pytest
import torch
from torch import nn

from apportion.errors import InvalidInput
from apportion.spaces.batches import frozen
from apportion.spaces.calibration import collect
from apportion.spaces.compressors.compose import InputStatistics
from apportion.spaces.degenerate import check_finite, degeneracy
from apportion.spaces.discovery import discover
from apportion.spaces.grammar import parse_option

INPUTS = 12
WEIGHT = torch.ones(4, INPUTS)


def said(x, *texts, weights=(WEIGHT,)):
    statistics = None if x is None else InputStatistics((x.T @ x).double(), len(x))
    return degeneracy(weights, statistics, [parse_option(text) for text in texts])


def normal(tokens=100):
    return torch.randn(tokens, INPUTS, generator=torch.Generator().manual_seed(0))


def dead(x, count):
    return x * (torch.arange(INPUTS) >= count)


def test_nothing_is_said_of_what_is_as_it_should_be():
    assert said(normal(), "dense", "w4", "s50%", "w4:gptq", "r50%", "s50%:sparsegpt") is None


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (normal(0), "no calibration data entered it"),
        (normal() * 0, "all of its 12 inputs were 0 throughout calibration"),
        (dead(normal(), 3), "3 of 12 inputs were 0 throughout calibration"),
        (torch.full((50, INPUTS), 2.0), "its inputs were the same throughout calibration, but for"),
        (normal(1), "its inputs were the same throughout calibration"),
    ],
)
def test_inputs_that_tell_little_are_told_of(x, words):
    for text in ("w8", "s50%", "w4:gptq", "r50%"):
        assert words in said(x, "dense", text)


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (normal(7), "calibration gave 7 tokens for 12 inputs"),
        (dead(normal(7), 3), "3 of 12 inputs were 0 throughout calibration, calibration gave 7 to"),
        (normal()[:, :6].repeat(1, 2), "some of its inputs are sums of multiples of others"),
        (normal() @ normal(5).T @ normal(5), "some of its inputs are sums of multiples of others"),
        ((normal()[:, :6] * 1e-15).repeat(1, 2), "some of its inputs are sums of multiples"),
    ],
)
def test_dependent_inputs_are_told_of_where_it_matters(x, words):
    for text in ("w4:gptq", "2:4:sparsegpt", "r50%", "w4+r8"):
        assert words in said(x, "w8", text)
    assert words.rpartition(", ")[2] not in (said(x, "w8", "s50%") or "")


def test_inputs_of_large_mean_are_not_taken_for_dependent():
    x = torch.randn(4000, INPUTS, generator=torch.Generator().manual_seed(1))
    assert said(x + 30, "w4:gptq") is None


def test_inputs_do_not_matter_to_options_that_need_none():
    assert said(normal() * 0, "dense", "w4:hqq", "s50%:magnitude", "r50%:svd", "bf16") is None
    assert said(None, "w4", "s50%") is None


def test_dead_output_channels_are_counted_over_all_members():
    half = WEIGHT.clone()
    half[:2] = 0
    words = "the weights of 2 of 8 output channels are all 0"
    assert said(normal(), "w4", weights=(half, WEIGHT)) == words
    both = said(dead(normal(), 3), "w4", weights=(half, WEIGHT))
    assert both == f"{words}, 3 of 12 inputs were 0 throughout calibration"


class Gated(nn.Module):
    """Two layers, the second of which runs on what the first one leaves above zero."""

    def __init__(self, shift: float) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(INPUTS, 8), nn.Linear(8, 4)
        self.shift = shift

    def forward(self, x):
        hidden = self.first(x) + self.shift
        some = hidden[hidden[:, 0] > 0]
        return self.second(some).sum() + hidden if len(some) or self.shift < 0 else hidden


@pytest.mark.parametrize("run_on_nothing", [True, False])
def test_layer_that_no_token_enters_has_a_moment_of_zeros(run_on_nothing):
    model = frozen(Gated(1000.0))
    sites = discover(model, torch.ones(2, INPUTS)).sites
    model.shift = -1000.0 if run_on_nothing else 0.0
    with torch.no_grad():
        model.first.bias.copy_(torch.full((8,), -1000.0))
    found = collect(model, sites, [normal(5)])
    assert (found["first"].tokens, found["second"].tokens) == (5, 0)
    assert not found["second"].second_moment.any() and not found["second"].peak.any()


@pytest.mark.parametrize("bad", [torch.nan, -torch.inf])
def test_weights_that_are_not_finite_are_named(bad):
    model = frozen(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)))
    sites = discover(model, torch.ones(2, 3)).sites
    check_finite(model, sites)
    model[1].weight.data[1, 1:] = bad
    told = r"model\.source: 2 of 6 values of 1\.weight \(site 1\) are not finite"
    with pytest.raises(InvalidInput, match=told):
        check_finite(model, sites)
