"""The example of a super-net: trained, submitted, killed, resumed, exported and verified."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

Journey = Any
ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "supernet"
# A short training, few evaluations, limits that no machine misses; all runs read the same timings.
SHORTER = {
    "train.py": {"STEPS = 1600": "STEPS = 10"},
    "study.toml": {
        'kind = "cpu"\nthreads = 1': 'kind = "recorded"\nfile = "timings.json"',
        "batch = 64": "batch = 4",
        'latency.here = "0.6x dense"': 'weight_bytes = "0.3x dense"\nlatency.here = "3x dense"',
        "windows = 500": "windows = 100",
        "tokens = 300_000": "tokens = 3_000",
    },
    # an evaluation that takes long enough to be killed
    "model.py": {
        '    found = cross_entropy(output, batch["labels"]': (
            '    __import__("time").sleep(0.2 * Path(__file__).with_name("slow").exists())\n'
            '    found = cross_entropy(output, batch["labels"]'
        )
    },
}


@dataclass(frozen=True)
class Ended:
    """A study that was killed in mid-search, resumed, and came to its end. Read it only."""

    journey: Journey
    undisturbed: Journey
    report: Any
    folder: Path

    @property
    def winner(self) -> Any:
        """The chosen point."""
        front = self.report["front"]
        return next(point for point in front if point["number"] == self.report["winner"])

    @property
    def chosen(self) -> dict[str, str]:
        """Choice block -> name of the alternative."""
        options = self.winner["configuration"].items()
        return {site: option.removeprefix("op:") for site, option in options}


def trained_example(journey: Journey) -> None:
    """A shorter example with a trained super-net and recorded timings."""
    for name in ("model.py", "train.py", "study.toml"):
        journey.folder.mkdir(exist_ok=True)
        shutil.copy(EXAMPLE / name, journey.folder)
        for there, here in SHORTER[name].items():
            journey.edit(name, there, here)
    subprocess.run([sys.executable, str(journey.folder / "train.py")], check=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        from tiny_study import record

        record(journey.study, journey.folder / "timings.json")


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory, journey_in: Callable[[Path], Journey]) -> Ended:
    folder = tmp_path_factory.mktemp("supernet")
    journey = journey_in(folder)
    trained_example(journey)
    (journey.folder / "slow").touch()
    with journey.process("submit", journey.study) as process:
        journey.until(lambda: journey.evaluated() > 4)
        os.killpg(process.pid, signal.SIGKILL)
    assert journey.nothing_left()
    (journey.folder / "slow").unlink()
    resumed = journey.run("resume", "supernet")
    assert (resumed.status, "resuming at search" in resumed.out) == (0, True), resumed.error
    undisturbed = type(journey)(journey.folder, folder / "undisturbed")
    assert undisturbed.submit().status == 0
    report = json.loads(journey.run("show", "supernet", "--json").out)
    assert journey.run("export", "supernet", "--to", folder / "winner").status == 0
    return Ended(journey, undisturbed, report, folder)


def test_killed_study_comes_to_the_same_end(ended: Ended) -> None:
    assert ended.journey.path("supernet") == ended.undisturbed.path("supernet")


def test_winner_keeps_its_limit_and_is_verified(ended: Ended) -> None:
    dense = (ended.journey.folder / "weights.safetensors").stat().st_size
    assert ended.winner["weight_bytes"] <= 0.3 * dense
    verified = ended.journey.run("verify", ended.folder / "winner", "--json")
    assert verified.status == 0, verified.error
    found = json.loads(verified.out)
    assert found["loss_found"] == pytest.approx(found["loss_promised"], rel=1e-6)


def test_export_holds_what_was_chosen_alone(ended: Ended) -> None:
    stored = load_file(ended.folder / "winner" / "model.safetensors")
    all_tensors = load_file(ended.journey.folder / "weights.safetensors")
    kept = {
        name: tensor
        for name, tensor in all_tensors.items()
        if ".alternatives." not in name
        or any(name.startswith(f"{at}.alternatives.{what}.") for at, what in ended.chosen.items())
    }
    assert stored.keys() == kept.keys() < all_tensors.keys()
    assert all(stored[name].equal(kept[name]) for name in kept)
    assert ended.winner["weight_bytes"] == sum(tensor.nbytes for tensor in kept.values())
