"""An encoder and a loss of the user's own, in another folder, read through a pipe."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ENCODER = """
from transformers import BertConfig, BertModel
from vocabulary import SIZE

def build():
    return BertModel(BertConfig(
        vocab_size=SIZE, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=16))
"""
SENTENCES = """
import torch
from vocabulary import SIZE

def load(part):
    draw = torch.Generator().manual_seed(["calibration", "search", "heldout"].index(part))
    ids = torch.randint(1, SIZE, (4, 4, 12), generator=draw)
    mask = (torch.arange(12) < torch.randint(6, 13, (4, 4, 1), generator=draw)).long()
    return [{"input_ids": i * m, "attention_mask": m} for i, m in zip(ids, mask)]
"""
LOSS = """
import torch

def embedding(output, batch):
    mask = batch["attention_mask"][..., None]
    return (output.last_hidden_state * mask).sum(1) / mask.sum(1)

def cosine(output, batch, reference_output):
    pair = embedding(output, batch), embedding(reference_output, batch)
    loss = 1 - torch.cosine_similarity(*pair, dim=-1)
    return loss, torch.ones(len(loss))
"""
STUDY = """
[study]
name = "encoder"
[model]
source = "python:../code/encoder.py:build"
[data]
source = "python:../code/sentences.py:load"
[objective]
loss = "python:../code/loss.py:cosine"
[[space]]
sites = "linear:*"
options = ["dense", "w8"]
[[space]]
sites = "block:*"
options = ["keep", "drop", "drop:mean"]
[devices.here]
threads = 1
[limits]
latency.here = "3x dense"
weight_bytes = "0.8x dense"
[search]
windows = 16
tokens = 600
"""


def apportion(folder: Path, words: str) -> str:
    """What a command writes into a pipe; it must succeed."""
    command = [sys.executable, "-m", "apportion", "--home", "home", *words.split()]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of the study, which is not that of the code, and what submit printed."""
    base = tmp_path_factory.mktemp("own")
    code, folder = base / "code", base / "study"
    for place in (code, folder):
        place.mkdir()
    (code / "vocabulary.py").write_text("SIZE = 100\n")
    (code / "encoder.py").write_text(ENCODER)
    (code / "sentences.py").write_text(SENTENCES)
    (code / "loss.py").write_text(LOSS)
    (folder / "study.toml").write_text(STUDY)
    return folder, apportion(folder, "submit study.toml")


def shown(folder: Path) -> Any:
    """The front as JSON."""
    return json.loads(apportion(folder, "show encoder --json"))


def test_own_loss_is_what_the_front_shows(finished: tuple[Path, str]) -> None:
    folder, printed = finished
    assert "held-out loss" in printed
    losses = [point["loss_heldout"] for point in shown(folder)["front"]]
    # float32 rounds the cosine of equal vectors to a little above one
    assert all(-1e-6 <= loss <= 2 for loss in losses)


def test_constants_in_place_of_the_blocks_are_in_the_bank(finished: tuple[Path, str]) -> None:
    # w8 of nine sites, and a constant for each of two blocks
    assert "bank 11 entries" in finished[1]


def test_pipe_gets_plain_lines(finished: tuple[Path, str]) -> None:
    folder, printed = finished
    assert "\x1b" not in printed and "\r" not in printed
    assert {"discover", "profile", "search", "confirm"} <= set(printed.split())


def test_own_model_is_exported_and_verified(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    apportion(folder, "export encoder --to winner")
    verified = json.loads(apportion(folder, "verify winner --json"))
    assert verified["ok"]
    report = shown(folder)
    winner = next(point for point in report["front"] if point["number"] == report["winner"])
    assert verified["weight_bytes"] == winner["weight_bytes"]
