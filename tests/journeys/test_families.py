"""A mixture of experts, a vision transformer, an LSTM and a CNN: killed, resumed, exported."""

import json
import os
import runpy
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import apportion

Journey = Any
ROOT = Path(__file__).parents[2]
FILES = Path(__file__).with_name("families")
STUDY = """
[study]
name = "family"
[model]
source = "python:model.py:build"
[data]
source = "python:data.py:load"
[objective]
loss = "python:loss.py:divergence"
batch = 4
[[space]]
sites = "{sites}"
options = ["dense", "w8", "w4g32", "s50%"]
[devices.here]
kind = "recorded"
file = "timings.json"
request = [{{ phase = "forward", batch = 1 }}]
[limits]
weight_bytes = "{share}x dense"
[search]
tokens = 120
windows = 8
offspring = 4
survivors = [2, 1]
stages = [2, 8]
"""
BLOCKS = """
[[space]]
sites = "block:*"
options = ["keep", "drop"]
"""
WIDTHS = """
[[space]]
sites = "*"
options = ["keep", "drop", "c50%", "c75%+w8", "c50%+w8"]
"""


@dataclass(frozen=True)
class Family:
    """A model with its data, and a limit that some of the searched sites must shrink for.

    Attributes:
        model, data: names of files beside this one.
        share: the limit on weight bytes, as a share of the dense ones.
        shrunk: a part of the names under which an export holds packed matrices.
    """

    model: str
    data: str
    sites: str
    share: float
    shrunk: str
    structure: str = BLOCKS

    def write(self, folder: Path) -> None:
        """The files of a study, but for the timings."""
        folder.mkdir()
        study = STUDY.format(sites=self.sites, share=self.share)
        study += self.structure
        (folder / "study.toml").write_text(study.lstrip())
        for there, here in (("model", self.model), ("data", self.data), ("loss", "divergence")):
            shutil.copy(FILES / f"{here}.py", folder / f"{there}.py")


FAMILIES = {
    "mixture": Family("mixture", "words", "*.experts.*", 0.35, ".experts.down_proj.7"),
    "vision": Family("vision", "images", "linear:*.layers.*", 0.35, ".mlp.fc2"),
    "recurrent": Family("recurrent", "words", "memory.*", 0.35, ".weight_hh_", ""),
    "convolutional": Family("convolutional", "images", "*.pointwise", 0.56, ".pointwise"),
    "narrow vision": Family("vision", "images", "*.mlp.fc2", 0.3, ".mlp.fc2", WIDTHS),
    "narrow convolutional": Family("inverted", "images", "*.project", 0.35, ".project", WIDTHS),
}


WITHOUT_STATISTICS = ("recurrent", "narrow convolutional")


@dataclass(frozen=True)
class Ended:
    """A study that was killed in mid-search, resumed, and came to its end. Read it only."""

    family: Family
    journey: Journey
    undisturbed: Journey
    report: Any
    folder: Path

    @property
    def winner(self) -> Any:
        """The chosen point."""
        front = self.report["front"]
        return next(point for point in front if point["number"] == self.report["winner"])

    def build(self) -> nn.Module:
        """The dense model."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            built: nn.Module = runpy.run_path(str(self.folder / "study" / "model.py"))["build"]()
        return built


def killed_and_resumed(journey: Journey) -> None:
    """SIGKILL in mid-search, then resume."""
    (journey.folder / "slow").touch()
    with journey.process("submit", journey.study) as process:
        journey.until(lambda: journey.evaluated() > 4)
        os.killpg(process.pid, signal.SIGKILL)
    assert journey.nothing_left()
    (journey.folder / "slow").unlink()
    resumed = journey.run("resume", "family")
    assert (resumed.status, "resuming at search" in resumed.out) == (0, True), resumed.error


@pytest.fixture(scope="module", params=FAMILIES)
def ended(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    journey_in: Callable[[Path], Journey],
) -> Ended:
    family, folder = FAMILIES[request.param], tmp_path_factory.mktemp(request.param)
    family.write(folder / "study")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        from tiny_study import record

        record(folder / "study" / "study.toml", folder / "study" / "timings.json")
    journey = journey_in(folder)
    killed_and_resumed(journey)
    undisturbed = type(journey)(journey.folder, folder / "undisturbed")
    submitted = undisturbed.submit()
    assert submitted.status == 0
    unknown = "nothing is known of the inputs" in submitted.out + submitted.error
    assert unknown == (request.param in WITHOUT_STATISTICS)
    report = json.loads(journey.run("show", "family", "--json").out)
    assert journey.run("export", "family", "--to", folder / "winner").status == 0
    return Ended(family, journey, undisturbed, report, folder)


def test_killed_study_comes_to_the_same_end(ended: Ended) -> None:
    assert ended.journey.path("family") == ended.undisturbed.path("family")


def test_winner_is_verified(ended: Ended) -> None:
    verified = ended.journey.run("verify", ended.folder / "winner", "--json")
    assert verified.status == 0, verified.error
    found = json.loads(verified.out)
    assert found["loss_promised"] > 1e-5
    assert found["loss_found"] == pytest.approx(found["loss_promised"], rel=0.01)


@pytest.mark.parametrize("ended", ["recurrent"], indirect=True)
def test_what_is_written_back_loses_what_was_promised_to_rounding(ended: Ended) -> None:
    copy = ended.folder / "promised-otherwise"
    shutil.copytree(ended.folder / "winner", copy)
    report = json.loads((copy / "report.json").read_text())
    report["point"]["loss_heldout"] += 1e-5
    (copy / "report.json").write_text(json.dumps(report))
    verified = ended.journey.run("verify", copy)
    assert verified.status != 0 and "promised was" in verified.out + verified.error


def test_winner_keeps_its_limit_because_it_is_packed(ended: Ended) -> None:
    tensors = load_file(ended.folder / "winner" / "model.safetensors")
    size = sum(tensor.nbytes for tensor in tensors.values())
    dense = sum(tensor.nbytes for tensor in ended.build().state_dict().values())
    assert size == ended.winner["weight_bytes"] <= ended.family.share * dense
    packed = {name.partition(".packed.")[0] for name in tensors if ".packed." in name}
    assert any(ended.family.shrunk in member for member in packed)
    rest = tuple(f"{name}." for name in tensors if ".packed." not in name)
    assert not any(f"{member}.".startswith(rest) for member in packed)


@pytest.mark.parametrize("ended", ["mixture"], indirect=True)
def test_every_expert_of_a_chosen_point_holds_four_bits(ended: Ended) -> None:
    point = next(p for p in ended.report["uniform"] if p["option"] == "w4g32")
    words = ("--to", ended.folder / "w4g32", "--trial", point["number"])
    assert ended.journey.run("export", "family", *words).status == 0
    dense = dict(ended.build().named_parameters())
    model = apportion.load(ended.folder / "w4g32", model=ended.build)
    experts = {n: p for n, p in model.named_parameters() if ".experts." in n}
    assert sum(len(stack) for name, stack in experts.items() if "down_proj" in name) == 64
    for name, stack in experts.items():
        assert max(len(group.unique()) for group in stack.reshape(-1, 32)) <= 16
        assert 0 < (stack - dense[name]).norm() < 0.15 * dense[name].norm()
    weights = sum(stack.numel() for stack in experts.values())
    fixed = sum(p.nbytes for name, p in dense.items() if name not in experts)
    assert point["weight_bytes"] == fixed + weights * 4 // 8 + weights // 32 * 4
