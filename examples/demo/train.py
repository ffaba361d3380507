"""Trains the shipped model again, as settings.json describes: python train.py --out FOLDER

A run that was stopped goes on where its last checkpoint stands. One process takes the 32 windows
of a step at once; the mean gradient is that of the original's two ranks with 16 windows each.
The original's random numbers are not known, so the weights differ and the curve is followed.
"""

import argparse
import csv
import hashlib
import math
import os
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent
STEPS = 4376
WINDOWS = 32
CONTEXT = 128
WARM_UP = 60
PEAK = 4e-3
LAST = 0.02
VALIDATION_WINDOWS = 64
SAVE_EVERY = 100
REPORT_EVERY = 200
FIRST_REPORT = 10
END = "<eos>"
LEFT_OUT = {"test", "tests", "idle_test", "encodings", "site-packages"}
COLUMNS = ("step", "tokens", "train_nats", "validation_nats")


def corpus() -> tuple[list[str], list[str]]:
    """Documents to train on, and those held out: the standard library of the running Python."""
    root = Path(sysconfig.get_path("stdlib"))
    training, held_out = [], []
    for file in sorted(root.rglob("*.py")):
        path = file.relative_to(root)
        if LEFT_OUT.intersection(path.parts[:-1]):
            continue
        digest = int(hashlib.md5(path.as_posix().encode()).hexdigest(), 16)
        (training if digest % 20 else held_out).append(file.read_text(encoding="utf-8"))
    return training, held_out


def train_tokenizer(documents: Sequence[str]) -> Tokenizer:
    """A byte-level BPE of 2048 entries; on Python 3.11.7 it is exactly the shipped one."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2048,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def token_ids(tokenizer: Tokenizer, documents: Sequence[str]) -> Tensor:
    """All documents in a row, an end token after each, int64 [tokens]."""
    end = tokenizer.token_to_id(END)
    encoded = tokenizer.encode_batch(list(documents), add_special_tokens=False)
    return torch.tensor([token for one in encoded for token in (*one.ids, end)])


def build_model() -> LlamaForCausalLM:
    """The architecture of the shipped model with fresh float32 weights."""
    config = LlamaConfig.from_pretrained(HERE / "model")
    model = LlamaForCausalLM(config).float()
    narrow = 0.02 / math.sqrt(2 * config.num_hidden_layers)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            is_output = name.endswith(("o_proj.weight", "down_proj.weight"))
            nn.init.normal_(parameter, std=narrow if is_output else 0.02)
    return model


def build_optimizer(model: nn.Module) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices alone."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim != 2]
    groups = [
        {"params": matrices, "weight_decay": 0.1},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=PEAK, betas=(0.9, 0.95))


def learning_rate(step: int) -> float:
    """Linear warm-up, then a cosine to 2 % of the peak; `step` counts from 1."""
    if step <= WARM_UP:
        return PEAK * step / WARM_UP
    turn = (step - WARM_UP) / (STEPS - WARM_UP)
    return PEAK * (LAST + (1 - LAST) * 0.5 * (1 + math.cos(math.pi * turn)))


def nats(model: nn.Module, windows: Tensor) -> Tensor:
    """Mean nats of each next token of windows [windows, tokens], computed in bfloat16."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=windows[:, :-1], use_cache=False).logits
    return cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())


def draw(tokens: Tensor, generator: torch.Generator) -> Tensor:
    """Windows from anywhere in the tokens, [windows, context + 1]."""
    starts = torch.randint(len(tokens) - CONTEXT, (WINDOWS, 1), generator=generator)
    return tokens[starts + torch.arange(CONTEXT + 1)]


def spread(tokens: Tensor) -> Tensor:
    """The windows to validate on, evenly spread over the held-out tokens."""
    windows = tokens[: len(tokens) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    return windows[torch.linspace(0, len(windows) - 1, VALIDATION_WINDOWS).long()]


class Run:
    """A training run in a folder: what a checkpoint holds, and the steps between two of them."""

    def __init__(self, folder: Path, training: Tensor, validation: Tensor) -> None:
        torch.manual_seed(0)
        self.folder = folder
        self.training = training
        self.validation = validation
        self.model = build_model()
        self.optimizer = build_optimizer(self.model)
        self.generator = torch.Generator().manual_seed(1)
        self.step = 0
        self.curve: list[list[float]] = []
        if self._checkpoint.is_file():
            self._restore()

    @property
    def _checkpoint(self) -> Path:
        return self.folder / "checkpoint.pt"

    def _restore(self) -> None:
        state: dict[str, Any] = torch.load(self._checkpoint, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        self.step, self.curve = state["step"], state["curve"]
        print(f"resuming at step {self.step}")

    def save(self) -> None:
        """Replace the checkpoint; a run that is killed meanwhile leaves the old one."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "step": self.step,
            "curve": self.curve,
        }
        unfinished = self._checkpoint.with_suffix(".unfinished")
        torch.save(state, unfinished)
        os.replace(unfinished, self._checkpoint)
        with (self.folder / "loss.csv").open("w", newline="") as file:
            csv.writer(file).writerows([COLUMNS, *self.curve])

    def advance(self) -> float:
        """One step; the nats of its batch."""
        self.step += 1
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step)
        loss = nats(self.model, draw(self.training, self.generator))
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return loss.item()

    def report(self, train_nats: float) -> None:
        """Add a row to the curve and print it."""
        with torch.no_grad():
            validation = nats(self.model, self.validation).item()
        tokens = self.step * WINDOWS * CONTEXT
        self.curve.append([self.step, tokens, round(train_nats, 3), round(validation, 4)])
        print(
            f"step {self.step:5d}  train {train_nats:.3f}  validation {validation:.4f}", flush=True
        )

    def until(self, last: int) -> None:
        """Train up to step `last`."""
        began, first = time.monotonic(), self.step
        while self.step < last:
            train_nats = self.advance()
            if self.step in (FIRST_REPORT, last) or self.step % REPORT_EVERY == 0:
                self.report(train_nats)
            if self.step == last or self.step % SAVE_EVERY == 0:
                self.save()
        if steps := self.step - first:
            print(f"{(time.monotonic() - began) / steps:.2f} s a step")


def write_model(run: Run, tokenizer: Tokenizer) -> None:
    """The Hugging Face folder: float16 weights and the tokenizer."""
    folder = run.folder / "model"
    run.model.half().save_pretrained(folder)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, bos_token=END, model_max_length=CONTEXT
    )
    wrapped.save_pretrained(folder)
    print(f"wrote {folder}")


def main() -> None:
    """Train, or go on training."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--steps", type=int, default=STEPS, help="where to stop")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    training, held_out = corpus()
    tokenizer = train_tokenizer(training)
    run = Run(options.out, token_ids(tokenizer, training), spread(token_ids(tokenizer, held_out)))
    size = sum(len(document.encode()) for document in training) / 1e6
    print(f"{len(training)} files, {size:.1f} MB, {len(run.training) / 1e6:.2f} M tokens")
    run.until(min(options.steps, STEPS))
    if run.step == STEPS:
        write_model(run, tokenizer)


if __name__ == "__main__":
    main()
