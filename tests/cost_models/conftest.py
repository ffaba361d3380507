"""A tiny residual model with two blocks, and its space."""

import pytest
import torch
from torch import Tensor, nn

from apportion.spaces.batches import frozen
from apportion.spaces.discovery import discover
from apportion.spaces.entries import Entry, build_space
from apportion.spaces.space import Space

WIDTH = 64
OPTIONS = ("dense", "bf16", "w8a8", "w4g64", "s60%", "r25%", "s50%+w4g64", "w3g32+r4")


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, 2 * WIDTH, bias=False)
        self.up = nn.Linear(WIDTH, 2 * WIDTH, bias=False)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.mlp = Mlp()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(WIDTH, 16)
        self.register_buffer("scale", torch.ones(3))
        self.register_buffer("scratch", torch.ones(7), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@pytest.fixture
def sample() -> Tensor:
    return torch.randn(4, 8, WIDTH, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def tiny() -> nn.Module:
    torch.manual_seed(0)
    return frozen(Tiny())


@pytest.fixture
def memory() -> tuple[nn.Module, Space]:
    """A recurrent layer alone: all its weights are written back."""
    torch.manual_seed(0)
    model = frozen(nn.LSTM(WIDTH, 32, batch_first=True))
    sites = discover(model, torch.randn(2, 3, WIDTH)).sites
    return model, build_space(sites, [Entry(("*",), ("dense", "w4g32", "s60%"))])


@pytest.fixture
def space(tiny: nn.Module, sample: Tensor) -> Space:
    entries = [Entry(("blocks.*",), OPTIONS), Entry(("block:*", "mlp:*"), ("keep", "drop"))]
    return build_space(discover(tiny, sample).sites, entries)
