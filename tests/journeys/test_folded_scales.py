"""A study whose scales of awq go into norms, from submit to verify."""

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
        self.norm = nn.LayerNorm(32)
        self.norm.weight.data = torch.rand(32) ** 4 * 20 + 0.1
        self.norm.bias.data = torch.randn(32)
        self.q, self.k = nn.Linear(32, 64), nn.Linear(32, 64)
        self.down = nn.Linear(64, 32)

    def forward(self, x):
        y = self.norm(x)
        return x + self.down(torch.relu(self.q(y)) * torch.tanh(self.k(y)))


def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Sequential(Block(), Block()), nn.Linear(32, 6))


def load(part):
    draw = torch.Generator().manual_seed(["calibration", "search", "heldout"].index(part))
    return [torch.randn(8, 32, generator=draw) for _ in range(2)]
"""


def test_scales_in_norms_are_exported_and_verified(tmp_path: Path, own_model: OwnModel) -> None:
    journey = own_model(MODEL, "linear:0.*", ["dense", "w4g16:awq"], "0.34x dense")
    winner = tmp_path / "winner"
    ended = journey.submit()
    assert (ended.status, ended.error) == (0, "")
    ended = journey.run("export", "tiny", "--to", winner)
    assert ended.status == 0, ended.error
    assert json.loads(journey.run("verify", winner, "--json").out)["ok"]

    report = json.loads(journey.run("show", "tiny", "--json").out)
    chosen = next(p for p in report["front"] if p["number"] == report["winner"])
    assert set(chosen["configuration"].values()) == {"w4g16:awq"}
    tensors = load_file(winner / "model.safetensors")
    assert chosen["weight_bytes"] == sum(t.nbytes for t in tensors.values())
    scaled = [name for name in tensors if name.endswith(".input_scale")]
    assert scaled == [f"0.{n}.down.packed.input_scale" for n in (0, 1)]
    code = runpy.run_path(str(journey.folder / "model.py"))
    block = code["build"]().get_submodule("0.1")
    norm = block.norm
    gain = tensors["0.1.norm.weight"] / norm.weight
    assert gain.max() / gain.min() > 2
    torch.testing.assert_close(tensors["0.1.norm.bias"] / norm.bias, gain)

    inputs = torch.cat(code["load"]("heldout"))
    with torch.no_grad():
        loaded, dense = apportion.load(winner, model=code["build"])(inputs), code["build"]()(inputs)
    assert 1e-4 < (loaded - dense).norm() / dense.norm() < 0.3

    ended = journey.run("export", "tiny", "--evopress", tmp_path / "levels")
    assert ended.status == 0, ended.error
    for name in ("q", "k"):  # weights for the dense norm
        written = torch.load(tmp_path / "levels" / f"0.1.{name}" / "4.pth", weights_only=True)
        weight = block.get_submodule(name).weight
        lost, *others = ((written * by - weight).norm() for by in (1, gain, 1 / gain))
        assert 0 < lost < 0.8 * min(others)
