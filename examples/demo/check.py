"""Checks the shipped model against settings.json, and with --curve train.py against loss.csv."""

import argparse
import csv
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import LlamaForCausalLM

HERE = Path(__file__).resolve().parent
CONTEXT = 128
PARTS = ("search", "heldout")
MOST_BITS = 0.001
MOST_NATS = {10: 0.15, 200: 0.2}
AT_ONCE = 64


def windows_of(folder: Path, tokenizer: Tokenizer) -> Tensor:
    """Full windows of each document, none across two, [windows, context]."""
    documents = [file.read_text(encoding="utf-8") for file in sorted(folder.iterdir())]
    encoded = tokenizer.encode_batch(documents, add_special_tokens=False)
    rows = [torch.tensor(one.ids[: len(one.ids) // CONTEXT * CONTEXT]) for one in encoded]
    return torch.cat(rows).long().view(-1, CONTEXT)


def bits_per_byte(model: nn.Module, windows: Tensor, bytes_of: Tensor) -> float:
    """Bits of all tokens but the first of each window, by the bytes that they stand for."""
    scored = windows[:, 1:]
    total = 0.0
    with torch.no_grad():
        for rows in windows.split(AT_ONCE):
            logits = model(input_ids=rows, use_cache=False).logits[:, :-1]
            lost = cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="none")
            total += lost.double().sum().item()
    return total / math.log(2) / bytes_of[scored].sum().item()


def check_model() -> bool:
    """Whether the shipped model scores what settings.json states."""
    model = LlamaForCausalLM.from_pretrained(HERE / "model", dtype=torch.float32).eval()
    tokenizer = Tokenizer.from_file(str(HERE / "model" / "tokenizer.json"))
    # a byte-level vocabulary spells each byte as one character
    texts = [tokenizer.id_to_token(number) for number in range(tokenizer.get_vocab_size())]
    bytes_of = torch.tensor([len(text) for text in texts])
    stated = json.loads((HERE / "settings.json").read_text())["result"]
    fine = True
    for part in PARTS:
        found = bits_per_byte(model, windows_of(HERE / "text" / part, tokenizer), bytes_of)
        expected = stated[part]["bits_per_byte"]
        fine &= told(f"{part}: bits per byte", found, expected, MOST_BITS)
    return fine


def check_curve(threads: int) -> bool:
    """Whether 200 steps of train.py follow the stated curve."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, HERE / "train.py", "--out", folder, "--steps", "200"]
        subprocess.run([*command, "--threads", str(threads)], check=True)
        found = validation_nats(Path(folder) / "loss.csv")
    stated = validation_nats(HERE / "loss.csv")
    results = [
        told(f"step {step}: validation nats", found[step], stated[step], most)
        for step, most in MOST_NATS.items()
    ]
    return all(results)


def validation_nats(file: Path) -> dict[int, float]:
    """Step -> nats of a curve."""
    with file.open(newline="") as rows:
        return {int(row["step"]): float(row["validation_nats"]) for row in csv.DictReader(rows)}


def told(what: str, found: float, expected: float, most: float) -> bool:
    """Print a comparison; whether it holds."""
    fine = abs(found - expected) <= most
    print(f"{what} {found:.5f}, stated {expected:.5f}: {'ok' if fine else f'off by over {most}'}")
    return fine


def main() -> int:
    """Exit status 0 where all holds, else 1."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--curve", action="store_true", help="also train 200 steps, for minutes")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    fine = check_model()
    if options.curve:
        fine &= check_curve(options.threads)
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
