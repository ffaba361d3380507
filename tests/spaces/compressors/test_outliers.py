"""Which weights are kept from rounding: their count, their cost, and what it spares the rest."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from apportion.kernels.codes import middle
from apportion.spaces.compressors.outliers import largest, sensitive
from apportion.spaces.compressors.quantize import quantize

GRIDS = [(3, 16, False), (4, 32, True), (1.58, 16, True), (2, None, False)]


def _heavy_tailed(out: int = 24, inputs: int = 64, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Student-t weights, three degrees of freedom, and mean squares of their inputs."""
    random = torch.Generator().manual_seed(seed)
    normal = torch.randn(4, out, inputs, generator=random)
    weight = 0.02 * normal[0] / (normal[1:] ** 2).mean(0).sqrt()
    return weight, torch.exp(torch.randn(inputs, generator=random, dtype=torch.float64))


def _costs(weight, bits, group, symmetric, kept, importance):
    """float64 [out, in], squared rounding error times mean square, written out."""
    found = quantize(weight, bits, group, symmetric, kept, importance)
    out, inputs = weight.shape
    size = group or inputs
    costs = torch.empty(out, inputs, dtype=torch.float64)
    for row in range(out):
        for column in range(inputs):
            place = (row, column // size)
            value = (float(found.codes[row, column]) - middle(bits)) * float(found.scale[place])
            if found.zero is not None:
                value += float(found.zero[place])
            error = float(weight[row, column]) - value
            costs[row, column] = error * error * float(importance[column])
    return costs


@given(st.data())
def test_largest_are_as_many_as_asked_and_none_left_out_is_larger(data):
    out, inputs = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 6))
    entries = st.lists(st.integers(0, 4), min_size=out * inputs, max_size=out * inputs)
    cost = torch.tensor(data.draw(entries)).float().reshape(out, inputs)
    kept = torch.tensor(data.draw(entries)).reshape(out, inputs) > 1
    count = data.draw(st.integers(0, int(kept.sum())))
    chosen = largest(cost, count, kept)
    assert int(chosen.sum()) == count and not (chosen & ~kept).any()
    others = kept & ~chosen
    if count and others.any():
        assert cost[chosen].min() >= cost[others].max()


def test_largest_takes_the_first_of_equals():
    assert largest(torch.ones(2, 3), 2).tolist() == [[True, True, False], [False] * 3]


@pytest.mark.parametrize(("bits", "group", "symmetric"), GRIDS)
@pytest.mark.parametrize("half", [False, True])
def test_sensitive_are_those_that_cost_most_on_scales_without_the_largest(
    bits, group, symmetric, half
):
    weight, importance = _heavy_tailed()
    kept = torch.rand(weight.shape, generator=torch.Generator().manual_seed(5)) < 0.5
    kept = kept if half else torch.ones_like(kept)
    far = sorted(
        range(weight.numel()), key=lambda i: -float(weight.flatten()[i].abs() * kept.flatten()[i])
    )
    rest = kept.clone().flatten()
    rest[far[:15]] = False
    costs = _costs(weight, bits, group, symmetric, rest.view_as(kept), importance) * kept
    chosen = sensitive(weight, 15, bits, group, symmetric, importance, kept if half else None)
    assert int(chosen.sum()) == 15 and not (chosen & ~kept).any()
    assert costs[chosen].min() >= costs[~chosen].max() * (1 - 1e-4)


@pytest.mark.parametrize(("bits", "group", "symmetric"), GRIDS)
def test_sensitive_spare_more_than_the_largest(bits, group, symmetric):
    weight, importance = _heavy_tailed(48, 128)
    errors = []
    for chosen in (
        sensitive(weight, 61, bits, group, symmetric, importance),
        largest(weight.abs(), 61),
        torch.zeros_like(weight, dtype=torch.bool),
    ):
        costs = _costs(weight, bits, group, symmetric, ~chosen, importance)
        errors.append(float((costs * ~chosen).sum()))
    assert errors[0] < errors[1] < 0.8 * errors[2]


def test_sensitive_without_live_inputs_counts_all_alike():
    weight, importance = _heavy_tailed()
    nothing = sensitive(weight, 9, 3, 16, False, torch.zeros_like(importance))
    alike = sensitive(weight, 9, 3, 16, False, torch.ones_like(importance))
    assert torch.equal(nothing, alike)
