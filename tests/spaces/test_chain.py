"""A model's chain of blocks: what is traced, what is refused, where passes begin and end."""

import pytest
import torch
from torch import nn

from apportion.spaces.batches import frozen
from apportion.spaces.chain import NoChain, Part, output_hash, trace
from apportion.spaces.discovery import discover

PATHS = ("blocks.0", "blocks.1", "blocks.2")


class Net(nn.Module):
    """Runs its blocks in an order that is given; `direct`: the last one's layer once more."""

    def __init__(self, order=(0, 1, 2), direct=False):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3))
        self.order, self.direct = order, direct

    def forward(self, x):
        for place in self.order:
            x = self.blocks[place](x)
        return self.blocks[2][0](x) if self.direct else x


def traced(model, layers=None):
    return trace(model, PATHS, layers or {}, torch.ones(2, 4))


def test_trace_is_in_the_order_of_execution():
    model = frozen(Net((2, 0, 1)))
    given = traced(model, {"blocks.1.0": "blocks.1"})
    assert list(given) == ["blocks.2", "blocks.0", "blocks.1"]
    assert given["blocks.1"] == output_hash(model(torch.ones(2, 4)))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_trace_refuses_a_block_that_runs_twice():
    with pytest.raises(NoChain, match=r"block blocks\.0 runs twice"):
        traced(frozen(Net((0, 1, 0, 2))))


def test_trace_refuses_a_layer_that_runs_outside_of_its_block():
    with pytest.raises(NoChain, match=r"layer blocks\.2\.0 runs outside of block blocks\.2"):
        traced(frozen(Net(direct=True)), {"blocks.2.0": "blocks.2"})


@pytest.mark.parametrize(("before", "last"), [(0, 0), (0, 2), (1, 1), (1, 2), (2, 2)])
def test_part_begins_and_ends_where_it_should(before, last):
    model, batch = frozen(Net()), torch.randn(2, 4)
    blocks = [s for s in discover(model, batch).sites if s.kind == "block"]
    given, calls = [batch], []
    for place, block in enumerate(model.blocks):
        given.append(block(given[-1]))
        block[0].register_forward_hook(lambda *_, place=place: calls.append(place))
    with Part(model, blocks[:before], PATHS[last]).entered() as run:
        output = run(batch, given[before] if before else None)
    assert torch.equal(output, given[last + 1])
    assert calls == list(range(before, last + 1))
    assert torch.equal(model(batch), given[-1])
