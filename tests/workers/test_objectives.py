"""Losses: the numbers themselves, in float64 by hand, and the messages for a wrong function."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from apportion.errors import InvalidInput
from apportion.workers.objectives import open_objective


def logits(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_kl_of_a_language_model_leaves_out_the_last_position() -> None:
    p, q = logits(2, 5, 7, seed=1), logits(2, 5, 7, seed=2)
    kl = open_objective("kl", Path())
    sums, weights = kl.measure(SimpleNamespace(logits=q), {}, SimpleNamespace(logits=p))
    log_p, log_q = p.double().log_softmax(-1)[:, :-1], q.double().log_softmax(-1)[:, :-1]
    exact = (log_p.exp() * (log_p - log_q)).sum((-1, -2)).numpy()
    np.testing.assert_allclose(sums, exact, rtol=1e-5)
    assert weights.tolist() == [4, 4]


def test_kl_of_a_classifier_has_one_position_per_window() -> None:
    p = logits(3, 4)
    sums, weights = open_objective("kl", Path()).measure(p, {}, p)
    assert sums.tolist() == [0, 0, 0]
    assert weights.tolist() == [1, 1, 1]


def test_perplexity_is_the_likelihood_of_the_next_tokens() -> None:
    ids = torch.tensor([[0, 2, 1]])
    output = SimpleNamespace(logits=logits(1, 3, 4))
    sums, weights = open_objective("perplexity", Path()).measure(output, {"input_ids": ids}, None)
    log_p = output.logits.double().log_softmax(-1)[0]
    assert sums[0] == pytest.approx(-(log_p[0, 2] + log_p[1, 1]).item(), rel=1e-6)
    assert weights.tolist() == [2]


@pytest.mark.parametrize("form", ["tuple", "dict"])
def test_accuracy_counts_errors_and_keeps_labels_from_the_model(form: str) -> None:
    x, labels = torch.eye(3), torch.tensor([0, 1, 0])
    batch = (x, labels) if form == "tuple" else {"x": x, "labels": labels}
    accuracy = open_objective("accuracy", Path())
    sums, weights = accuracy.measure(x, batch, None)
    assert (sums.tolist(), weights.tolist()) == ([0, 0, 1], [1, 1, 1])
    assert len(accuracy.inputs(batch)) == 1


def test_accuracy_without_labels() -> None:
    with pytest.raises(InvalidInput, match="accuracy needs labels"):
        open_objective("accuracy", Path()).inputs({"x": torch.eye(2)})


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("def loss(output):\n    return output", "does not take three arguments"),
        ("def loss(o, b, r):\n    return (o - r).sum()", "returned Tensor"),
        ("def loss(o, b, r):\n    return o.sum(), 1", "for a batch of 2 windows"),
        ("def loss(o, b, r):\n    return o.no_such", "raised AttributeError"),
    ],
)
def test_wrong_loss_function_is_told(tmp_path: Path, body: str, message: str) -> None:
    (tmp_path / "loss.py").write_text(body)
    x = torch.ones(2, 3)
    with pytest.raises(InvalidInput, match="^[^\n]*$") as error:
        open_objective("python:loss.py:loss", tmp_path).measure(x, x, x)
    assert message in str(error.value)


def test_user_loss_is_called_with_output_batch_and_reference(tmp_path: Path) -> None:
    code = "def loss(o, b, r):\n    return ((o - r) ** 2).sum(-1) + b.sum(-1), [1, 2]"
    (tmp_path / "loss.py").write_text(code)
    measure = open_objective("python:loss.py:loss", tmp_path).measure
    sums, weights = measure(torch.ones(2, 3), torch.zeros(2, 3), torch.zeros(2, 3))
    assert (sums.tolist(), weights.tolist()) == ([3, 3], [1, 2])


def test_unknown_loss() -> None:
    with pytest.raises(InvalidInput, match="is not one of kl"):
        open_objective("kls", Path())


def test_output_that_kl_cannot_score() -> None:
    with pytest.raises(InvalidInput, match="reference_output"):
        open_objective("kl", Path()).measure({"x": 1}, {}, {"x": 1})
