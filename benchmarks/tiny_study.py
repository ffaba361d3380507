"""Writes a study that takes a second: a tiny model, its data, and a recorded device.

Every measurement is taken once, here, quickly; all runs of the study then read the same stored
timings, so they must come to the same end.
"""

import sys
from pathlib import Path

from apportion.cost_models.fingerprint import fingerprint
from apportion.cost_models.profile import measure_profile
from apportion.cost_models.recorded import write_recorded
from apportion.cost_models.requests import RequestItem
from apportion.cost_models.session import Stored, Timing
from apportion.studies.context import worker_spec
from apportion.studies.home import Home
from apportion.studies.specification import load
from apportion.studies.stages.profile import request_of, uniform_configs
from apportion.workers.spec import open_setting

MODEL = '''
"""Two blocks of attention and a gated MLP, random but for the seed that the caller sets."""

import torch
from torch import Tensor, nn

WIDTH = 64


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        scores = self.q(x) @ self.k(x).transpose(-1, -2)
        return self.o(torch.softmax(scores / WIDTH**0.5, -1) @ self.v(x))


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.mlp = Attention(), Mlp()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + self.mlp(x)


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block() for _ in range(2)])
        self.head = nn.Linear(WIDTH, 16)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(10 * x)


def build() -> nn.Module:
    return Tiny()
'''
DATA = '''
"""Random windows of 8 vectors, others for each part."""

import torch

PARTS = ("calibration", "search", "heldout")


def load(part: str) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(PARTS.index(part))
    return [torch.randn(4, 8, 64, generator=generator) for _ in range(3)]
'''
STUDY = """
[study]
name = "tiny"
[model]
source = "python:model.py:build"
[data]
source = "python:data.py:load"
[objective]
batch = 4
[[space]]
sites = "linear:blocks.*"
options = ["dense", "w8", "w4g32", "r50%"]
[[space]]
sites = ["attention:*", "mlp:*"]
options = ["keep", "drop"]
[devices.here]
kind = "recorded"
file = "timings.json"
request = [{ phase = "forward", batch = 1 }]
[limits]
weight_bytes = "0.4x dense"
latency.here = "1x dense"
[search]
tokens = 200
windows = 8
offspring = 4
survivors = [2, 1]
stages = [2, 8]
"""
QUICK = Timing(operator_seconds=0.01, model_seconds=0.01, half_width=0.1)


def write(folder: Path) -> Path:
    """Write the study's files into `folder`, which is made; gives the study file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.py").write_text(MODEL.lstrip())
    (folder / "data.py").write_text(DATA.lstrip())
    study = folder / "study.toml"
    study.write_text(STUDY.lstrip())
    if not (folder / "timings.json").is_file():
        record(study, folder / "timings.json")
    return study


def record(study: Path, file: Path) -> None:
    """Measure what the study's device is asked for, and write it as a recorded device."""
    file.write_text("{}")  # the specification wants it there
    spec = load(study)
    setting = open_setting(worker_spec(spec, Home(study.parent)))
    taken: dict[str, Stored] = {}
    measure_profile(
        setting.opened.model,
        setting.space,
        [RequestItem.from_json(item) for item in request_of(spec.devices["here"])],
        setting.sample,
        threads=1,
        known={},
        record=taken.update,
        seed=spec.study.seed,
        uniforms=list(uniform_configs(setting.opened.model, setting.space).values()),
        timing=QUICK,
    )
    write_recorded(file, fingerprint(1), taken)


if __name__ == "__main__":
    print(write(Path(sys.argv[1]).absolute()))
