"""The evaluator's treated experts compute what the applied configuration does."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from apportion.spaces.apply import apply, member_weight
from apportion.spaces.bank import Bank
from apportion.spaces.batches import frozen
from apportion.spaces.compressors.treatment import realize_treatment
from apportion.spaces.discovery import discover
from apportion.spaces.entries import Entry, build_space
from apportion.spaces.narrowing import shared_copy
from apportion.workers.realized import RealizedStore

WIDTH, EXPERTS = 8, 4


class Mixture(nn.Module):
    """`[n, 8]` -> the same: each row to one of four layers."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, EXPERTS)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(EXPERTS))

    def forward(self, x: Tensor) -> Tensor:
        gates, chosen = self.gate(x).softmax(-1).max(-1)
        result = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            own = torch.where(chosen == number)[0]
            result = result.index_add(0, own, expert(x[own]) * gates[own, None])
        return result


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = Mixture()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(x)


def build() -> nn.Module:
    torch.manual_seed(0)
    return frozen(nn.Sequential(Block(), Block()))


@pytest.mark.parametrize("text", ["c50%", "c75%+w4g8"])
def test_treated_experts_equal_what_is_applied(text: str, tmp_path: Path) -> None:
    model, x = build(), torch.randn(50, WIDTH, generator=torch.Generator().manual_seed(1))
    space = build_space(discover(model, x).sites, [Entry(("mlp:*",), ("keep", text))])
    site, option = space.sites[1], space.options[1][1]
    weights = [member_weight(model, m) for group in site.groups for m in group]
    assert site.width is not None
    bank = Bank(tmp_path)
    bank.put("entry", realize_treatment(weights, site.width, option, [None], "float32"))
    store = RealizedStore(bank, {site.name: {text: "entry"}}, 1 << 20)
    narrow = store.replacement(site, text, shared_copy(model))
    apply(model, space, {site.name: text}, lambda *_: bank.get("entry"), {})
    expected = model.get_submodule(site.name)(x)
    assert narrow(x).equal(expected) and not expected.equal(build()[1].mlp(x))
    size = sum(w.shape.weights for w in bank.get("entry").weights)
    assert store.used_bytes >= 4 * size
