"""The time of packing a cache: what is timed, and in which row it ends."""

from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from apportion.cost_models.cache_work import CacheWork
from apportion.cost_models.profile import measure_profile
from apportion.cost_models.requests import RequestItem
from apportion.cost_models.session import Timing
from apportion.kernels.packed_cache import CacheFormat
from apportion.spaces.batches import frozen
from apportion.spaces.caches import find_caches
from apportion.spaces.discovery import discover
from apportion.spaces.entries import Entry, build_space
from apportion.spaces.sites import Cached

QUICK = Timing(operator_seconds=0.01, model_seconds=0.01, half_width=0.1)
SIZES = dict(hidden_size=32, vocab_size=96, num_hidden_layers=2, num_attention_heads=4)
REQUEST = [
    RequestItem("prefill", batch=2, tokens=40),
    RequestItem("decode", batch=2, context=48, count=8),
]


@pytest.fixture(scope="module")
def made():
    """A small Llama with caches of two formats, its space, and a sample."""
    model = frozen(LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=40)))
    sample = {"input_ids": torch.ones(1, 40, dtype=torch.int64)}
    sites = discover(model, sample).sites
    sites = find_caches(model, sample, sites).among(sites)
    return model, build_space(sites, [Entry(("cache:*",), ("k8v8", "k4v2"))]), sample


def profile_of(made, known, timing=QUICK):
    model, space, sample = made
    words = dict(threads=1, known=known, record=known.update, timing=timing, configurations=4)
    return measure_profile(model, space, REQUEST, sample, **words)


def test_rows_are_of_packing_less_what_the_dense_cache_does(made):
    known = {}
    profile = profile_of(made, known)
    works = [m["subject"]["cache"] for m in known.values() if "cache" in m.get("subject", {})]
    # Both layers are alike: two formats at once, and two and the dense cache for each token.
    told = {(str(work["bits"]), tuple(work["tokens"])) for work in works}
    assert len(works) == len(told) == 5
    assert told >= {("[4, 2]", (2, 0, 40)), ("None", (2, 48, 1)), ("[8, 8]", (2, 48, 1))}
    for row in profile.rows:
        assert row[0] == 0 and min(row[1:]) > 0
    assert set(profile.factors[0]) == {"packed cache", "structure"}
    assert profile_of(made, known, timing=None) == profile


def test_models_that_differ_in_a_cache_are_timed_apart(made):
    known = {}
    profile_of(made, known)
    subjects = [m["subject"] for m in known.values() if "operators" in m.get("subject", {})]
    decoding = [s["operators"] for s in subjects if s["work"]["phase"] == "decode"]
    packed = {tuple(names) for names in decoding if any("cache:" in name for name in names)}
    # Each layer dense or in one of two formats, whichever layer it is: all but the dense model.
    assert 2 <= len(packed) <= 5


def test_only_cached_tokens_are_work_to_a_dense_cache():
    one = CacheWork(CacheFormat(4, 2), Cached("past_key_values", 0, 2, 8, 8), 3, 63, 1, "bfloat16")
    assert one.unpacked == replace(one, format=None)
    assert replace(one, context=0).unpacked is None


@pytest.mark.parametrize("context", [0, 31, 40])
def test_work_can_be_done_again_and_again(context):
    cached = Cached("past_key_values", 0, 2, 8, 8)
    call = CacheWork(CacheFormat(4, 2), cached, 3, context, 1, "bfloat16").call()
    shapes = [[tuple(each.shape) for each in call()] for _ in range(3)]
    assert shapes[1:] == shapes[:1] * 2
    _, (batch, heads, tokens, channels) = shapes[0]
    assert (batch, heads, channels) == (3, 2, 8) and tokens >= context + 1
