"""A tiny language model with text, a bank of its options, and the specification of a worker."""

import json
import os
import random
import select
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
)

from apportion.spaces.apply import member_weight
from apportion.spaces.bank import Bank
from apportion.spaces.compressors.compose import realize
from apportion.spaces.compressors.treatment import realize_treatment
from apportion.spaces.stored import StoredSite
from apportion.workers.spec import WorkerSpec, open_setting

Descendants = Callable[[int], set[int]]
CONTEXT = 16
WORDS = "def return self value for in range if else while class import from print yield".split()


def ends(pid: int, seconds: float = 30) -> bool:
    """Whether the process ends in time. One that nobody has asked for yet has ended too."""
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([process], [], [], seconds)[0])
    finally:
        os.close(process)


def write_text(folder: Path, documents: int, words: int, seed: int) -> None:
    folder.mkdir()
    generator = random.Random(seed)
    for number in range(documents):
        text = " ".join(generator.choice(WORDS) for _ in range(words))
        (folder / f"{number}.txt").write_text(text)


def write_checkpoint(folder: Path, text: Path) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train([str(file) for file in text.iterdir()], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def fill_bank(spec: WorkerSpec) -> None:
    setting = open_setting(spec)
    bank, index = Bank(Path(spec["bank"])), {}
    for site, options in zip(setting.space.sites, setting.space.options, strict=True):
        index[site.name] = {}
        weights = [member_weight(setting.opened.model, m) for group in site.groups for m in group]
        for option in options[1:]:
            key = f"{len(index):02}{option}".replace("%", "p")
            if option.narrows:
                unknown = [None] * len(site.groups)
                stored = realize_treatment(weights, site.width, option, unknown, "float32")
            elif str(option) == "drop:mean":
                constant = torch.linspace(-1, 1, max(site.constant)).view(site.constant)
                stored = StoredSite((), constant=constant)
            elif site.is_structure:
                continue
            else:
                pairs = zip(weights, site.members, strict=True)
                made = (realize(w, m.shape, option, None, "float32") for w, m in pairs)
                stored = StoredSite(tuple(made))
            bank.put(key, stored)
            index[site.name][str(option)] = key
    Path(spec["index"]).write_text(json.dumps(index))


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("workers")
    write_text(folder / "text", documents=12, words=120, seed=1)
    write_checkpoint(folder / "model", folder / "text")
    return folder


@pytest.fixture(scope="session")
def spec(home: Path) -> WorkerSpec:
    made = WorkerSpec(
        source=f"hf:{home / 'model'}",
        dtype="float32",
        trust_remote_code=False,
        data={
            "source": f"text:{home / 'text'}",
            "context": CONTEXT,
            "tokens": {"calibration": 160, "search": 320, "heldout": 160},
        },
        seed=0,
        objective="kl",
        threads=1,
        batch=4,
        space=[
            [["*.self_attn.*", "*.mlp.*"], ["dense", "w4g32", "bf16", "s50%"]],
            [
                ["attention:*", "mlp:*", "block:*"],
                ["keep", "drop", "drop:mean", "c50%", "c50%+w4g16"],
            ],
        ],
        rank_multiple=8,
        bank=str(home / "bank"),
        index=str(home / "index.json"),
        base=str(home),
        budgets={},
    )
    fill_bank(made)
    return made


@pytest.fixture(scope="session")
def mixture_spec(home: Path, spec: WorkerSpec) -> WorkerSpec:
    """The same for a mixture of experts, which lie in stacks."""
    folder = home / "mixture"
    shutil.copytree(home / "model", folder, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
    )
    MixtralForCausalLM(config).save_pretrained(folder)
    made = spec | {
        "source": f"hf:{folder}",
        "space": [
            [["*.self_attn.*", "*.experts.*"], ["dense", "w4g32", "s50%"]],
            [["mlp:*", "block:*"], ["keep", "drop"]],
        ],
        "bank": str(home / "mixture-bank"),
        "index": str(home / "mixture-index.json"),
    }
    fill_bank(made)
    return made


def _descendants(root: int) -> set[int]:
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            # The second field, the name in parentheses, may hold spaces and parentheses.
            state, parent, *_ = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if state != "Z":
            parents[int(stat.parent.name)] = int(parent)
    below = {root}
    while more := {pid for pid, parent in parents.items() if parent in below} - below:
        below |= more
    return below - {root}


@pytest.fixture(scope="session")
def descendants() -> Descendants:
    """Ids of all processes below a process."""
    return _descendants
