"""Studies whose attention keeps half of its value or query-key dimensions, submit to verify."""

import json
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import apportion

Journey = Any
OwnModel = Callable[..., Journey]
MODEL = """
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(32, 64), nn.Linear(32, 32), nn.Linear(32, 32)
        self.o = nn.Linear(64, 32)

    def forward(self, x):
        q, k, v = (y.unflatten(-1, (-1, 16)).transpose(1, 2)
                   for y in (self.q(x), self.k(x), self.v(x)))
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        return self.o(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = Attention()

    def forward(self, x):
        return x + self.attention(x)


def build():
    return nn.Sequential(nn.Sequential(Block(), Block()), nn.Linear(32, 6))


def load(part):
    draw = torch.Generator().manual_seed(["calibration", "search", "heldout"].index(part))
    return [torch.randn(8, 5, 32, generator=draw) for _ in range(2)]
"""


@pytest.mark.parametrize("step", ["v", "q"])
def test_fewer_dimensions_of_heads_are_exported_and_verified(
    tmp_path: Path, own_model: OwnModel, step: str
) -> None:
    options = ["keep", f"{step}50%", f"{step}50%+w8"]
    journey = own_model(MODEL, "attention:*", options, "0.6x dense")
    told = " ".join(journey.run("sites", journey.study).out.split())
    assert "vP% keeps some of the 16 value dimensions of each head" in told
    assert "qP% keeps some of the 16 query-key dimensions of each head" in told
    ended = journey.submit()
    assert (ended.status, ended.error) == (0, "")
    report = json.loads(journey.run("show", "tiny", "--json").out)
    assert report["uniform"]
    for point in report["front"]:
        check(journey, tmp_path / f"{point['number']}", point)
    used = {text for point in report["front"] for text in point["configuration"].values()}
    assert used >= set(options[1:])


def check(journey: Journey, folder: Path, point: Any) -> None:
    """Export a point: its loss and bytes are the promised ones, its layers as narrow as said."""
    words = ("--to", folder, "--trial", point["number"])
    assert journey.run("export", "tiny", *words).status == 0
    verified = json.loads(journey.run("verify", folder, "--json").out)
    assert verified["ok"]
    assert verified["loss_found"] == pytest.approx(verified["loss_promised"], rel=1e-3, abs=1e-9)
    tensors = load_file(folder / "model.safetensors")
    assert point["weight_bytes"] == sum(tensor.nbytes for tensor in tensors.values())
    code = runpy.run_path(str(journey.folder / "model.py"))
    loaded = apportion.load(folder, model=code["build"])
    for block, option in enumerate(point["configuration"].values()):
        if option == "keep":
            continue
        values = "codes" if option.endswith("w8") else "weight"
        held = f"0.{block}.attention"
        one, other = ("v", "o") if option.startswith("v") else ("k", "q")
        assert tensors[f"{held}.{one}.bias"].shape == (16,)
        assert tensors[f"{held}.{one}.packed.{values}"].numel() == 16 * 32
        assert tensors[f"{held}.{other}.packed.{values}"].numel() == 32 * 32
        attention = loaded.get_submodule(held)
        given = attention.get_submodule(one)(torch.randn(3, 32)).view(3, 2, 16)
        assert given[..., :8].all() and not given[..., 8:].any()
