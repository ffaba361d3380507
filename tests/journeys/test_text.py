"""Checkpoints and text that are wrong: one line each, and no study."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

Journey = Any
PARTS = ("calibration", "search", "heldout")
STUDY = """
[study]
name = "text"
[model]
source = "model"
[data]
calibration = "text:calibration"
search = "text:search"
heldout = "text:heldout"
context = 16
tokens = { calibration = 64, search = 64, heldout = 64 }
[[space]]
sites = "*"
options = ["dense", "w8"]
unfit = "skip"
[limits]
weight_bytes = "0.9x dense"
"""


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two blocks over bytes, with random weights."""
    folder = tmp_path_factory.mktemp("checkpoint")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({sign: k for k, sign in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    LlamaForCausalLM(LlamaConfig(vocab_size=256, **sizes, **heads)).save_pretrained(folder)
    return folder


@pytest.fixture
def text(journey: Journey, checkpoint: Path) -> Journey:
    """A study of the checkpoint, of which each test breaks a copy."""
    shutil.copytree(checkpoint, journey.folder / "model")
    for part in PARTS:
        (journey.folder / part).mkdir()
        (journey.folder / part / "one.txt").write_text(f"{part} is a part of the data. " * 20)
    journey.study.write_text(STUDY)
    return journey


def remove(folder: Path, pattern: str) -> None:
    for file in folder.glob(pattern):
        file.unlink()


def break_model(folder: Path, how: str) -> None:
    model = folder / "model"
    weights = model / "model.safetensors"
    match how:
        case "missing folder":
            model.rename(folder / "elsewhere")
        case "empty folder":
            remove(model, "*")
        case "cut weights":
            weights.write_bytes(weights.read_bytes()[:1000])
        case "no weights at all":
            weights.write_bytes(b"")
        case "pickle":
            remove(model, "*.safetensors")
            torch.save({}, model / "pytorch_model.bin")
        case "tokenizer":
            remove(model, "token*")
        case "damaged tokenizer":
            (model / "tokenizer.json").write_text("{")
        case "configuration":
            (model / "config.json").write_text("{}")
        case "damaged configuration":
            (model / "config.json").write_text("{")


MODELS = {
    "missing folder": "no folder",
    "empty folder": "holds no .safetensors file",
    "cut weights": "cannot be loaded",
    "no weights at all": "cannot be loaded",
    "pickle": "other formats can execute code",
    "tokenizer": "text needs a tokenizer",
    "damaged tokenizer": "cannot be loaded",
    "configuration": "cannot be loaded",
    "damaged configuration": "cannot be loaded",
}


def break_data(folder: Path, how: str) -> None:
    search = folder / "search"
    match how:
        case "missing folder":
            search.rename(folder / "elsewhere")
        case "empty folder":
            remove(search, "*")
        case "empty document":
            (search / "one.txt").write_text("")
        case "binary document":
            (search / "two.bin").write_bytes(bytes(range(256)))
        case "other encoding":
            (search / "two.txt").write_bytes("é".encode("latin-1"))
        case "short documents":
            (search / "one.txt").write_text("short")
        case "shared document":
            (search / "two.txt").write_bytes((folder / "heldout" / "one.txt").read_bytes())


DATA = {
    "missing folder": "no file or folder",
    "empty folder": "holds no text",
    "empty document": "holds no text",
    "binary document": "is binary, not text",
    "other encoding": "is not UTF-8 text",
    "short documents": "leaves no window of 16 tokens for search",
    "shared document": "search and heldout share 1 documents",
}


def assert_refused(journey: Journey, words: str) -> None:
    ended = journey.submit()
    assert (ended.status, len(ended.error.splitlines())) == (2, 1), ended.error
    assert words in ended.error
    assert journey.listed() == []


@pytest.mark.parametrize("how", MODELS)
def test_checkpoint_that_is_wrong(text: Journey, how: str) -> None:
    break_model(text.folder, how)
    assert_refused(text, MODELS[how])


@pytest.mark.parametrize("how", DATA)
def test_text_that_is_wrong(text: Journey, how: str) -> None:
    break_data(text.folder, how)
    assert_refused(text, DATA[how])
