"""A study with activations that are rounded by one fixed scale, from submit to verify."""

import json
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import apportion

OwnModel = Callable[..., Any]
MODEL = """
import torch
from torch import nn


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k = nn.Linear(16, 32), nn.Linear(16, 32)
        self.down = nn.Linear(32, 16)

    def forward(self, x):
        return x + self.down(torch.relu(self.q(x)) * torch.tanh(self.k(x)))


def build():
    return nn.Sequential(nn.Sequential(Block(), Block()), nn.Linear(16, 6))


def load(part):
    draw = torch.Generator().manual_seed(["calibration", "search", "heldout"].index(part))
    return [torch.randn(8, 16, generator=draw) for _ in range(2)]
"""


def test_fixed_scales_are_exported_and_verified(tmp_path: Path, own_model: OwnModel) -> None:
    journey = own_model(MODEL, "linear:0.*", ["dense", "w8a8s"], "0.34x dense")
    winner = tmp_path / "winner"
    ended = journey.submit()
    assert (ended.status, ended.error) == (0, "")
    ended = journey.run("export", "tiny", "--to", winner)
    assert ended.status == 0, ended.error
    assert json.loads(journey.run("verify", winner, "--json").out)["ok"]

    report = json.loads(journey.run("show", "tiny", "--json").out)
    chosen = next(p for p in report["front"] if p["number"] == report["winner"])
    tensors = load_file(winner / "model.safetensors")
    assert chosen["weight_bytes"] == sum(t.nbytes for t in tensors.values())
    scales = {n: t for n, t in tensors.items() if n.endswith(".packed.activation_scale")}
    assert len(scales) == 6 and all(t.shape == (1,) and t.item() > 0 for t in scales.values())
    code = runpy.run_path(str(journey.folder / "model.py"))
    largest = torch.cat(code["load"]("calibration")).abs().max().reshape(1)
    for member in ("q", "k"):
        assert torch.equal(scales[f"0.0.{member}.packed.activation_scale"], largest / 127)

    loaded = apportion.load(winner, model=code["build"])
    inputs = torch.cat(code["load"]("heldout"))
    with torch.no_grad():
        alone = torch.cat([loaded(each[None]) for each in inputs])
        torch.testing.assert_close(loaded(inputs), alone)
