"""The evaluator switches alternatives, and its caches stay right."""

import copy
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from apportion.spaces.bank import Bank
from apportion.spaces.batches import frozen
from apportion.spaces.choice import Choice
from apportion.spaces.discovery import discover
from apportion.spaces.entries import Entry, build_space
from apportion.workers.evaluator import Evaluate, Evaluator
from apportion.workers.objectives import open_objective
from apportion.workers.realized import RealizedStore
from apportion.workers.samples import Samples
from apportion.workers.sources import OpenedModel

WIDTH, WINDOWS = 8, 6
NAMES = ("wide", "narrow", "skip")
CHOICES = ("1.0.op", "1.1.op")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        wide = nn.Sequential(nn.Linear(WIDTH, 32), nn.ReLU(), nn.Linear(32, WIDTH))
        self.op = Choice({"wide": wide, "narrow": nn.Linear(WIDTH, WIDTH), "skip": nn.Identity()})

    def forward(self, x):
        return x + self.op(x)


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return frozen(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Sequential(Block(), Block())))


@pytest.fixture
def samples() -> Samples:
    draw = torch.Generator().manual_seed(1)
    batches = [torch.randn(WINDOWS // 2, WIDTH, generator=draw) for _ in range(2)]
    return Samples(batches, None, "", frozenset(), None)


@pytest.fixture
def evaluator(net: nn.Module, samples: Samples, tmp_path: Path) -> Evaluator:
    """Of a copy, so that `net` stays what it is."""
    model = copy.deepcopy(net)
    sites = discover(model, samples.batches[0]).sites
    options = tuple(f"op:{name}" for name in NAMES)
    space = build_space(sites, [Entry(("choice:*",), options), Entry(("block:*",), ("drop",))])
    blocks = [site for site in sites if site.kind == "block"]
    store = RealizedStore(Bank(tmp_path), {}, 1 << 20)
    opened = OpenedModel(model, None, "", "", False)
    objective = open_objective("kl", tmp_path)
    return Evaluator(opened, space, blocks, store, objective, lambda part: samples)


def losses(evaluator: Evaluator, names: tuple[str, ...], **more: str) -> NDArray[np.float64]:
    chosen = {path: f"op:{name}" for path, name in zip(CHOICES, names, strict=True)}
    found = evaluator.evaluate(Evaluate({**chosen, **more}, "search", 0, WINDOWS)).losses
    assert found is not None
    return found


def by_hand(net: nn.Module, samples: Samples, names: tuple[str, ...]) -> NDArray[np.float64]:
    """The same losses of a module without choice blocks."""
    built = copy.deepcopy(net)
    for path, name in zip(CHOICES, names, strict=True):
        built.set_submodule(path, built.get_submodule(path).alternatives[name])
    measure = open_objective("kl", Path()).measure
    parts = [measure(built(batch), batch, net(batch))[0] for batch in samples.batches]
    return np.concatenate(parts)


def test_losses_are_those_of_modules_built_with_the_alternatives(
    net: nn.Module, samples: Samples, evaluator: Evaluator
) -> None:
    assert len(evaluator._blocks.gates) == 2
    pairs = list(itertools.product(NAMES, NAMES))
    for names in [*pairs, *reversed(pairs)]:
        np.testing.assert_array_equal(losses(evaluator, names), by_hand(net, samples, names))
    assert not losses(evaluator, ("wide", "wide")).any()
    assert losses(evaluator, ("skip", "wide")).all()


def test_alternative_under_a_dropped_block_changes_nothing(evaluator: Evaluator) -> None:
    dropped = {"1.0": "drop"}
    first, other = (losses(evaluator, (name, "narrow"), **dropped) for name in ("wide", "skip"))
    np.testing.assert_array_equal(first, other)
    assert first.all()
