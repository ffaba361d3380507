"""The example of a convolutional net, from submit to verify, as a user types it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "cnn"
# Fewer evaluations than the example, and a limit that no machine misses.
SMALLER = {
    "windows = 200": "windows = 50",
    "stages = [50, 200]": "stages = [50]\nsurvivors = [1]",
    "tokens = 20_000": "tokens = 2_500",
    'latency.here = "0.8x dense"': 'latency.here = "3x dense"',
}


def apportion(*arguments: str, cwd: Path) -> str:
    """What a command prints; it must succeed."""
    command = [sys.executable, "-m", "apportion", "--home", "home", *arguments]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a copy of the example and its finished study."""
    folder = tmp_path_factory.mktemp("cnn")
    for name in ("model.py", "weights.safetensors", "study.toml"):
        shutil.copy(EXAMPLE / name, folder)
    text = (folder / "study.toml").read_text()
    for there, here in SMALLER.items():
        assert text.count(there) == 1
        text = text.replace(there, here)
    (folder / "study.toml").write_text(text)
    printed = apportion("submit", "study.toml", cwd=folder)
    assert "front (limits: weight_bytes <= 0.2x dense" in printed
    return folder


def shown(folder: Path) -> Any:
    """The front as JSON."""
    return json.loads(apportion("show", "digits", "--json", cwd=folder))


def test_cnn_winner_keeps_the_limit(finished: Path) -> None:
    report = shown(finished)
    winner = next(point for point in report["front"] if point["number"] == report["winner"])
    dense = (finished / "weights.safetensors").stat().st_size
    assert winner["weight_bytes"] <= 0.2 * dense
    assert 0 <= winner["loss_heldout"] < 0.1
    assert {"w8", "w4g32", "w3g32", "w2g32"} <= {u["option"] for u in report["uniform"]}


def test_cnn_export_is_verified(finished: Path) -> None:
    apportion("export", "digits", "--to", "winner", cwd=finished)
    verified = json.loads(apportion("verify", "winner", "--json", cwd=finished))
    report = shown(finished)
    winner = next(point for point in report["front"] if point["number"] == report["winner"])
    assert verified["ok"]
    assert verified["weight_bytes"] == winner["weight_bytes"]
    assert verified["loss_found"] == pytest.approx(winner["loss_heldout"], rel=1e-2, abs=1e-4)
