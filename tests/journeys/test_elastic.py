"""A model trained for elastic depth and width, from submit to verify."""

import json
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import apportion
from apportion.spaces.elastic import trained_space
from apportion.spaces.subnetworks import Supernet

Journey = Any
OPTIONS = ["keep", "drop", "c75%:first", "c50%:first"]
MODEL = """
from pathlib import Path

import torch
from safetensors.torch import load_file
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


def fresh():
    torch.manual_seed(0)
    return nn.Sequential(nn.Sequential(*(Block() for _ in range(3))), nn.Linear(16, 6))


def build():
    model = fresh()
    model.load_state_dict(load_file(Path(__file__).with_name("weights.safetensors")))
    return model


def load(part):
    draw = torch.Generator().manual_seed(["calibration", "search", "heldout"].index(part))
    return [torch.randn(8, 16, generator=draw) for _ in range(2)]
"""
STUDY = f"""
[study]
name = "elastic"
[model]
source = "python:model.py:build"
[data]
source = "python:model.py:load"
[[space]]
sites = "mlp:*"
options = {OPTIONS}
[limits]
weight_bytes = "0.6x dense"
[search]
windows = 8
tokens = 100
"""


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(32, 16)
    return x, x[:, :6].argmax(-1)


def test_chosen_subnetworks_are_exported_as_they_were_trained(
    tmp_path: Path, journey_in: Callable[[Path], Journey]
) -> None:
    folder = tmp_path / "study"
    folder.mkdir()
    (folder / "model.py").write_text(MODEL.lstrip())
    (folder / "study.toml").write_text(STUDY.lstrip())
    model = runpy.run_path(str(folder / "model.py"))["fresh"]()
    apportion.train_supernet(
        model,
        batch,
        torch.nn.functional.cross_entropy,
        checkpoint=tmp_path / "checkpoint",
        steps=60,
        elastic={"mlp:*": OPTIONS},
    )
    save_file(model.state_dict(), folder / "weights.safetensors")
    journey = journey_in(tmp_path)
    submitted = journey.submit()
    assert (submitted.status, submitted.error) == (0, "")
    exported = journey.run("export", "elastic", "--to", tmp_path / "winner")
    assert exported.status == 0, exported.error
    assert json.loads(journey.run("verify", tmp_path / "winner", "--json").out)["ok"]
    uniform = json.loads(journey.run("show", "elastic", "--json").out)["uniform"]
    numbers = {point["option"]: point["number"] for point in uniform}
    words = ("--to", tmp_path / "half", "--trial", numbers["c50%:first"])
    assert journey.run("export", "elastic", *words).status == 0

    x, _ = batch(0)
    supernet = Supernet(model, trained_space(model, {"mlp:*": OPTIONS}, lambda: x))
    build = runpy.run_path(str(folder / "model.py"))["build"]
    for name in ("winner", "half"):
        told = json.loads((tmp_path / name / "apportion.json").read_text())
        chosen = told["configuration"]
        assert {"keep"} != set(chosen.values()) <= set(OPTIONS)
        with torch.no_grad():
            expected = supernet.run(chosen, x)
            found = apportion.load(tmp_path / name, model=build)(x)
        torch.testing.assert_close(found, expected)
