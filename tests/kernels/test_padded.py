"""Padded layers against dense matrices with zeros in the places that are left out."""

import pytest
import torch
from torch import nn

from apportion.kernels.padded import HeadStarts, PaddedHeads


def layer(inputs, outputs, dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Linear(inputs, outputs).requires_grad_(False).to(dtype)


@pytest.mark.parametrize("lead", [(), (5,), (2, 3)])
@pytest.mark.parametrize("places", [[0, 1, 4, 5], [0, 1, 2, 3, 6, 7]])
def test_missing_outputs_are_zero(lead, places):
    narrow, x = layer(6, len(places)), torch.randn(*lead, 6)
    padded = PaddedHeads(narrow, places, 8)(x)
    expected = torch.zeros(*lead, 8)
    expected[..., places] = narrow(x)
    assert torch.equal(padded, expected)


@pytest.mark.parametrize("lead", [(), (5,), (2, 3)])
def test_only_the_first_features_of_each_head_are_read(lead):
    narrow, x = layer(6, 7), torch.randn(*lead, 3 * 4)
    dense = torch.zeros(7, 3, 4)
    dense[..., :2] = narrow.weight.view(7, 3, 2)
    expected = nn.functional.linear(x, dense.view(7, 12), narrow.bias)
    torch.testing.assert_close(HeadStarts(narrow, 3, 2)(x), expected)


def test_a_token_does_not_depend_on_others():
    x = torch.randn(4, 6)
    for module in (PaddedHeads(layer(6, 2), [1, 3], 4), HeadStarts(layer(4, 5), 2, 2)):
        torch.testing.assert_close(module(x)[2:3], module(x[2:3]))


def test_dtype_is_that_of_the_layer_and_the_state_holds_its_weights_alone():
    module = PaddedHeads(layer(6, 2, torch.bfloat16), [1, 3], 4)
    assert module(torch.randn(3, 6).bfloat16()).dtype == torch.bfloat16
    assert set(module.state_dict()) == {"layer.weight", "layer.bias"}
