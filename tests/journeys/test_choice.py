"""A network with choice blocks, from submit to the exported module, in one process."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import apportion
from apportion.errors import InvalidInput
from apportion.spaces.artifact import TENSORS
from apportion.spaces.loading import describe
from apportion.studies.study import Study, sites
from apportion.workers.sources import open_model

MODEL = """
import torch
from torch import nn

from apportion import Choice


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp = Choice({
            "wide": nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16)),
            "narrow": nn.Linear(16, 16),
            "skip": nn.Identity(),
        })

    def forward(self, x):
        return x + self.mlp(x)


def build():
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block())


def load(part):
    draw = torch.Generator().manual_seed(["calibration", "search", "heldout"].index(part))
    return [torch.randn(8, 16, generator=draw) for _ in range(2)]
"""
STUDY = """
[study]
name = "choice"
[model]
source = "python:model.py:build"
[data]
source = "python:model.py:load"
[objective]
loss = "kl"
[[space]]
sites = "choice:*"
options = ["op:wide", "op:narrow", "op:skip"]
[limits]
weight_bytes = "0.6x dense"
[search]
windows = 8
tokens = 200
"""
WIDE, NARROW = 4 * (2 * 16 * 64 + 64 + 16), 4 * (16 * 16 + 16)


def test_study_of_choice_blocks_alone_ends_in_what_it_chose(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(MODEL)
    (tmp_path / "study.toml").write_text(STUDY)
    study = Study.submit(tmp_path / "study.toml", home=tmp_path / "home")
    winner = next(p for p in study.front() if p.number == study.show()["winner"])
    folder = study.export(tmp_path / "winner")
    chosen = describe(folder)["chosen"]
    size = {"wide": WIDE, "narrow": NARROW, "skip": 0}
    assert sum(size[name] for name in chosen.values()) == winner.weight_bytes <= 0.6 * 2 * WIDE
    with pytest.raises(InvalidInput, match="EvoPress has no level for"):
        study.export_evopress(tmp_path / "evopress")
    stored = sum(t.nbytes for t in load_file(folder / TENSORS).values())
    assert stored == winner.weight_bytes

    source = f"python:{tmp_path / 'model.py'}:build"
    built = open_model(source, "float32", tmp_path).model
    loaded = apportion.load(folder, model=lambda: open_model(source, "float32", tmp_path).model)
    for path, name in chosen.items():
        built.set_submodule(path, built.get_submodule(path).alternatives[name])
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(7))
    assert torch.equal(loaded(x), built(x))


def test_sites_of_a_study_list_choice_blocks_and_what_lies_in_them(tmp_path: Path) -> None:
    from apportion.studies.specification import load

    (tmp_path / "model.py").write_text(MODEL)
    (tmp_path / "study.toml").write_text(STUDY)
    rows = {row["name"]: row for row in sites(load(tmp_path / "study.toml"))}
    assert rows["0.mlp"]["options"] == ["op:wide", "op:narrow", "op:skip"]
    assert rows["0.mlp"]["note"] == "a choice block: runs one of wide, narrow, skip"
    assert "choice block" in rows["0.mlp.alternatives.wide.0"]["note"]
