"""Pieces of work, and models doing them."""

import pytest
import torch

from apportion.cost_models.requests import RequestItem, resized, runner
from apportion.errors import InvalidInput


@pytest.fixture
def llama():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize(
    ("value", "word"),
    [
        ({"phase": "train"}, '"train" is unknown'),
        ({"phase": "prefill"}, "needs tokens"),
        ({"phase": "decode", "tokens": 4}, "takes no tokens"),
        ({"phase": "forward", "batch": 0}, "needs batch"),
        ({"phase": "forward", "images": 3}, 'unknown key "images"'),
    ],
)
def test_request_unfit_parts_are_refused(value: dict, word: str) -> None:
    with pytest.raises(InvalidInput, match=word):
        RequestItem.from_json(value)


def test_request_survives_json() -> None:
    item = RequestItem("decode", batch=2, context=16, count=8)
    assert RequestItem.from_json(item.to_json()) == item


def test_resized_repeats_and_cuts() -> None:
    assert resized(torch.arange(3), 7).tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert {k: len(v) for k, v in resized({"a": torch.ones(5, 2)}, 2).items()} == {"a": 2}


def test_forward_takes_any_model(tiny, sample) -> None:
    assert runner(tiny, RequestItem("forward", batch=3), sample)().shape == (3, 8, 16)


def test_prefill_needs_a_vocabulary(tiny, sample) -> None:
    with pytest.raises(InvalidInput, match="vocab_size"):
        runner(tiny, RequestItem("prefill", tokens=4), sample)


def test_prefill_scores_all_tokens(llama, sample) -> None:
    assert runner(llama, RequestItem("prefill", batch=2, tokens=5), sample)().logits.shape == (
        2, 5, 64,
    )  # fmt: skip


def test_decode_step_leaves_its_cache_as_it_was(llama, sample) -> None:
    step = runner(llama, RequestItem("decode", batch=2, context=9), sample)
    first, second = step(), step()
    assert first.logits.shape == (2, 1, 64)
    assert first.past_key_values.get_seq_length() == 9
    assert torch.equal(first.logits, second.logits)


def test_decode_step_equals_the_whole_sequence(llama, sample) -> None:
    ids = torch.randint(64, (1, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = llama(torch.cat([ids, ids[:, -1:]], dim=1)).logits[:, -1:]
    step = runner(llama, RequestItem("decode", context=9), sample)()
    assert torch.allclose(step.logits, whole, atol=1e-5)
