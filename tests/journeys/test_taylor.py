"""A study whose sub-blocks become narrower by gradients, from submit to verify."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

OwnModel = Callable[..., Any]
MODEL = """
import torch
from torch import nn


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp = Mlp()

    def forward(self, x):
        return x + self.mlp(x)


def build():
    return nn.Sequential(nn.Sequential(Block(), Block()), nn.Linear(16, 6))


def load(part):
    draw = torch.Generator().manual_seed(["calibration", "search", "heldout"].index(part))
    return [torch.randn(8, 16, generator=draw) for _ in range(2)]
"""


def test_narrower_model_by_gradients_is_exported_and_verified(
    tmp_path: Path, own_model: OwnModel
) -> None:
    options = ["keep", "c50%:taylor", "c50%:taylor+w8"]
    journey = own_model(MODEL, "mlp:*", options, "0.7x dense")
    ended = journey.submit()
    assert (ended.status, ended.error) == (0, "")
    assert "gradients of 2 sub-blocks on 16 windows" in ended.out
    ended = journey.run("export", "tiny", "--to", tmp_path / "winner")
    assert ended.status == 0, ended.error
    told = json.loads((tmp_path / "winner" / "apportion.json").read_text())
    assert any(text.startswith("c50%:taylor") for text in told["configuration"].values())
    verified = json.loads(journey.run("verify", tmp_path / "winner", "--json").out)
    assert verified["ok"]
