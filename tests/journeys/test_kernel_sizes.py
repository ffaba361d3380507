"""A net of elastic kernels on digits: trained, submitted, killed, resumed, exported, verified."""

import json
import os
import runpy
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import apportion
from apportion.spaces.elastic import trained_space
from apportion.spaces.subnetworks import Supernet

Journey = Any
ROOT = Path(__file__).parents[2]
MODEL = """
import time
from pathlib import Path

import torch
from apportion import elastic_kernel
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

CHANNELS = 8


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        conv = nn.Conv2d(CHANNELS, CHANNELS, 7, padding=3, groups=CHANNELS)
        self.spatial = elastic_kernel(conv, sizes=(7, 5, 3))
        self.norm, self.mix = nn.GroupNorm(2, CHANNELS), nn.Conv2d(CHANNELS, CHANNELS, 1)

    def forward(self, x):
        return x + self.mix(torch.relu(self.norm(self.spatial(x))))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, CHANNELS, 1)
        self.blocks = nn.ModuleList([Block(), Block(), Block()])
        self.head = nn.Linear(4 * CHANNELS, 10)

    def forward(self, images, labels=None):
        if labels is not None:
            time.sleep(0.2 * Path(__file__).with_name("slow").exists())
        x = self.stem(images)
        for block in self.blocks:
            x = block(x)
        return self.head(nn.functional.avg_pool2d(torch.relu(x), 4).flatten(1))


def build():
    model = Net()
    model.load_state_dict(load_file(Path(__file__).with_name("weights.safetensors")))
    return model


def digits(first, last):
    images, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(images[first:last]).float().view(-1, 1, 8, 8) / 16
    return images, torch.from_numpy(labels[first:last])


def data(part):
    first = {"calibration": 0, "search": 1000, "heldout": 1200}[part]
    images, labels = digits(first, first + 200)
    return [{"images": i, "labels": n} for i, n in zip(images.split(50), labels.split(50))]


def loss(output, batch, reference):
    found = cross_entropy(output, batch["labels"], reduction="none")
    return found, torch.ones_like(found)
"""
STUDY = """
[study]
name = "kernels"
[model]
source = "python:model.py:build"
[data]
source = "python:model.py:data"
[objective]
loss = "python:model.py:loss"
[[space]]
sites = "choice:*"
options = ["op:k7", "op:k5", "op:k3"]
[devices.here]
kind = "recorded"
file = "timings.json"
request = [{ phase = "forward", batch = 4 }]
[limits]
weight_bytes = "0.8x dense"
[search]
windows = 100
tokens = 1_000
"""


def trained(journey: Journey) -> torch.nn.Module:
    """The model of a study, with its weights and timings beside it."""
    journey.folder.mkdir()
    (journey.folder / "model.py").write_text(MODEL.lstrip())
    journey.study.write_text(STUDY.lstrip())
    code = runpy.run_path(str(journey.folder / "model.py"))
    images, labels = code["digits"](0, 1000)

    def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        chosen = torch.randperm(len(images))[:32]
        return images[chosen], labels[chosen]

    torch.manual_seed(0)
    model: torch.nn.Module = code["Net"]()
    loss = torch.nn.functional.cross_entropy
    file = journey.folder / "checkpoint.safetensors"
    apportion.train_supernet(model, batch, loss, checkpoint=file, steps=12, learning_rate=0.01)
    save_file(model.state_dict(), journey.folder / "weights.safetensors")
    record = runpy.run_path(str(ROOT / "benchmarks" / "tiny_study.py"))["record"]
    record(journey.study, journey.folder / "timings.json")
    return model


def test_chosen_kernels_are_exported_alone_and_as_they_were_trained(
    tmp_path: Path, journey_in: Callable[[Path], Journey]
) -> None:
    journey = journey_in(tmp_path)
    model = trained(journey)
    (journey.folder / "slow").touch()
    with journey.process("submit", journey.study) as process:
        journey.until(lambda: journey.evaluated() > 2)
        os.killpg(process.pid, signal.SIGKILL)
    assert journey.nothing_left()
    (journey.folder / "slow").unlink()
    resumed = journey.run("resume", "kernels")
    assert (resumed.status, "resuming at search" in resumed.out) == (0, True), resumed.error
    exported = journey.run("export", "kernels", "--to", tmp_path / "winner")
    assert exported.status == 0, exported.error
    assert json.loads(journey.run("verify", tmp_path / "winner", "--json").out)["ok"]

    report = json.loads(journey.run("show", "kernels", "--json").out)
    winner = next(p for p in report["front"] if p["number"] == report["winner"])
    sizes = {
        site: int(option.removeprefix("op:k")) for site, option in winner["configuration"].items()
    }
    stored = load_file(tmp_path / "winner" / "model.safetensors")
    kernels = {name: tensor.shape[-1] for name, tensor in stored.items() if "spatial" in name}
    expected = {
        f"{site}.alternatives.k{size}.{name}": width
        for site, size in sizes.items()
        for name, width in (("weight", size), ("bias", 8))
    }
    assert len(sizes) == 3 and sum(sizes.values()) < 21 and kernels == expected
    assert sum(tensor.nbytes for tensor in stored.values()) == winner["weight_bytes"]

    code = runpy.run_path(str(journey.folder / "model.py"))
    images, _ = code["digits"](1400, 1500)
    supernet = Supernet(model, trained_space(model, {}, lambda: images))
    loaded = apportion.load(tmp_path / "winner", model=code["build"])
    with torch.no_grad():
        assert torch.equal(loaded(images), supernet.run(winner["configuration"], images))
