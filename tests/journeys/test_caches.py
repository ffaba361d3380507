"""A language model whose cache is packed, and its weights too, from submit to verify."""

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import apportion
from apportion.kernels.cache_layer import PackedLayer
from apportion.spaces.grammar import parse_option

Journey = Any
ROOT = Path(__file__).parents[2]
PARTS = ("calibration", "search", "heldout")
STUDY = """
[study]
name = "tiny"
[model]
source = "model"
dtype = "float32"
[data]
calibration = "text:calibration"
search = "text:search"
heldout = "text:heldout"
context = 40
tokens = { calibration = 160, search = 160, heldout = 160 }
[[space]]
sites = "*.mlp.*"
options = ["dense", "w8"]
[[space]]
sites = "attention:*"
options = ["keep", "drop"]
[[space]]
sites = "cache:*"
options = ["k8v8", "k4v2"]
[devices.here]
kind = "recorded"
file = "timings.json"
request = [
  { phase = "prefill", batch = 1, tokens = 40 },
  { phase = "decode", batch = 1, context = 40, count = 8 },
]
[limits]
weight_bytes = "0.9x dense"
cache_bytes = "1x k8v8"
[search]
windows = 4
tokens = 1200
"""
LAYERS = 2
BYTES_OF = {"keep": 2 * 16 * 4, "k8v8": 16 + 2 + 16 + 4, "k4v2": 8 + 2 + 4 + 4}
"""Of one head of 16 channels: keys' scales belong to 32 tokens, values' to one."""


@pytest.fixture
def cached(tmp_path: Path, journey_in: Any) -> Journey:
    """A study of a Llama of two blocks over bytes, with random weights, timed here."""
    journey = journey_in(tmp_path)
    journey.folder.mkdir()
    folder = journey.folder / "model"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({sign: k for k, sign in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": LAYERS}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 256}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**sizes, **heads)).save_pretrained(folder)
    for part in PARTS:
        (journey.folder / part).mkdir()
        (journey.folder / part / "one.txt").write_text(f"{part} is a part of the data. " * 20)
    journey.study.write_text(STUDY)
    script = runpy.run_path(str(ROOT / "benchmarks" / "tiny_study.py"))
    script["record"](journey.study, journey.folder / "timings.json")
    return journey


def test_packed_caches_are_exported_and_verified(tmp_path: Path, cached: Journey) -> None:
    told = json.loads(cached.run("sites", cached.study, "--json").out)
    caches = [site for site in told if site["kind"] == "cache"]
    assert [site["name"] for site in caches] == [
        f"model.layers.{layer}.self_attn.cache" for layer in range(LAYERS)
    ]
    ended = cached.submit()
    assert (ended.status, ended.error) == (0, "")
    report = json.loads(cached.run("show", "tiny", "--json").out)
    for point in [*report["front"], *report["uniform"]]:
        assert point["cache_bytes"] == cache_bytes(point["configuration"])
    winner = next(p for p in report["front"] if p["number"] == report["winner"])
    assert winner["cache_bytes"] <= LAYERS * BYTES_OF["k8v8"]
    check(cached, tmp_path / "winner", winner)
    uniform = next(p for p in report["uniform"] if p["option"] == "k4v2")
    assert {option for _, option in chosen(uniform["configuration"])} == {"k4v2"}
    check(cached, tmp_path / "uniform", uniform)


def chosen(configuration: dict[str, str]) -> list[tuple[int, str]]:
    """(layer, option) of each cache whose attention is there."""
    paths = {layer: f"model.layers.{layer}.self_attn" for layer in range(LAYERS)}
    kept = {layer: path for layer, path in paths.items() if configuration[path] == "keep"}
    return [(layer, configuration[f"{path}.cache"]) for layer, path in kept.items()]


def cache_bytes(configuration: dict[str, str]) -> int:
    return sum(BYTES_OF[option] for _, option in chosen(configuration))


def check(journey: Journey, folder: Path, point: Any) -> None:
    """Export a point: its loss is the promised one, and what it generates is held packed."""
    words = ("--to", folder, "--trial", point["number"])
    assert journey.run("export", "tiny", *words).status == 0
    verified = json.loads(journey.run("verify", folder, "--json").out)
    assert verified["ok"]
    assert verified["loss_found"] == pytest.approx(verified["loss_promised"], rel=1e-3, abs=1e-8)
    loaded: Any = apportion.load(folder)
    words = {"max_new_tokens": 30, "min_new_tokens": 30, "do_sample": False, "pad_token_id": 0}
    given = torch.arange(35)[None]
    cache = loaded.generate(given, return_dict_in_generate=True, **words).past_key_values
    for layer, option in chosen(point["configuration"]):
        held = cache.layers[layer]
        assert isinstance(held, PackedLayer) == (option != "keep")
        assert held.get_seq_length() == 64
        if option != "keep":
            assert held.packed.packed_bytes == 64 * BYTES_OF[option]
            assert (held.format.key_bits, held.format.value_bits) == parse_option(option).cache_bits
