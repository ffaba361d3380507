"""The order of units: the model computes the same, and the first ones are the largest."""

import pytest
import torch
from torch import nn

from apportion import sort_units
from apportion.errors import InvalidInput
from apportion.hashing import tensors_hash
from apportion.spaces.batches import call, main_tensor

WIDTH, INNER = 8, 12


class Mlp(nn.Module):
    def __init__(self, inner: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)
        self.inner = inner

    def forward(self, x):
        return self.down(torch.relu(self.up(x)).reshape(len(x), self.inner))


class Block(nn.Module):
    """`[n, 8]` -> the same."""

    def __init__(self, inner: int = -1) -> None:
        super().__init__()
        self.mlp = Mlp(inner)

    def forward(self, x):
        return x + self.mlp(x)


def net(inner: int = -1) -> nn.Module:
    """Where `inner` is not -1, the forward knows its width."""
    torch.manual_seed(0)
    return nn.Sequential(Block(inner), Block(inner)).requires_grad_(False)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "conv"])
def test_sorted_model_computes_the_same(family, make_model, make_batch):
    model, inputs = make_model(family).double(), make_batch(family)
    if isinstance(inputs, torch.Tensor):
        inputs = inputs.double()
    before, expected = tensors_hash(model.state_dict()), main_tensor(call(model, inputs))
    sort_units(model, inputs, ["*"])
    assert tensors_hash(model.state_dict()) != before
    torch.testing.assert_close(main_tensor(call(model, inputs)), expected, rtol=0, atol=1e-9)


def test_first_units_of_a_sorted_model_are_those_of_most_magnitude():
    model, x = net(), torch.randn(4, WIDTH)
    other = model[0].mlp.up.weight.clone()
    up, down = model[1].mlp.up.weight, model[1].mlp.down.weight
    order = (up.norm(dim=1) * down.norm(dim=0)).argsort(descending=True)
    expected = up[order].clone(), down[:, order].clone(), model[1].mlp.up.bias[order].clone()
    model.train()
    sort_units(model, x, ["1.mlp"])
    found = up, down, model[1].mlp.up.bias
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert torch.equal(model[0].mlp.up.weight, other) and model.training


def test_units_without_an_order_are_refused_with_the_reason():
    x = torch.randn(4, WIDTH)
    with pytest.raises(InvalidInput, match='"mlp:.*be put in order; 0.mlp: with'):
        sort_units(net(INNER), x, ["mlp:*"])
    with pytest.raises(InvalidInput, match='"mpl:.*" names none'):
        sort_units(net(), x, ["mpl:*"])
