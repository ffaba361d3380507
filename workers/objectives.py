"""What a configuration loses against the dense model: a sum and a weight for each window."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import log_softmax

from apportion.errors import InvalidInput
from apportion.spaces.batches import Batch, main_tensor
from apportion.workers import user_code
from apportion.workers.samples import windows_in

SIGNATURE = (
    "def loss(output, batch, reference_output): return sum, weight "
    "(one of each per window, lower is better)"
)
SCORED = "kl and perplexity take an output with .logits, or a tensor [windows, classes]"
LABELS = "labels"
IGNORED_LABEL = -100
# Logits are turned into float32 probabilities so many at a time.
ENTRIES_AT_ONCE = 1 << 24

PerWindow = tuple[NDArray[np.float64], NDArray[np.float64]]
Measure = Callable[[Any, Batch, Any], PerWindow]


@dataclass(frozen=True)
class Objective:
    """A loss.

    Attributes:
        source: "kl", "perplexity", "accuracy" or "python:file.py:function", resolved.
        hash: of the user's file; of the name otherwise.
        needs_reference: whether `measure` reads the dense model's output.
        measure: (output, batch, reference output) -> sums and weights, float64 [windows].
        has_labels: the batch carries labels that the model is not given.
    """

    source: str
    hash: str
    needs_reference: bool
    measure: Measure
    has_labels: bool = False

    def inputs(self, batch: Batch) -> Batch:
        """What of a batch the model is given."""
        return _without_labels(batch) if self.has_labels else batch


def open_objective(source: str, base: Path) -> Objective:
    """The loss that a study file names.

    Raises:
        InvalidInput: an unknown name, or a function that does not take the three arguments.
    """
    if source == "kl":
        return Objective("kl", "kl", True, _kl)
    if source == "perplexity":
        return Objective("perplexity", "perplexity", False, negative_log_likelihood)
    if source == "accuracy":
        return Objective("accuracy", "accuracy", False, _errors, has_labels=True)
    if source.startswith(user_code.PREFIX):
        return _user_objective(source, base)
    raise InvalidInput(
        f'objective.loss: "{source}" is not one of kl, perplexity, accuracy, '
        "python:file.py:function"
    )


def _user_objective(source: str, base: Path) -> Objective:
    function = user_code.load_function(source, base, "objective.loss")
    try:
        inspect.signature(function.function).bind(None, None, None)
    except TypeError as error:
        raise InvalidInput(
            f"objective.loss: {function.source} does not take three arguments; "
            f"its signature is {SIGNATURE}"
        ) from error

    def measure(output: Any, batch: Batch, reference: Any) -> PerWindow:
        return _checked(function(output, batch, reference), windows_in(batch), function.source)

    return Objective(function.source, function.hash, True, measure)


def _checked(returned: object, windows: int, source: str) -> PerWindow:
    if isinstance(returned, tuple | list) and len(returned) == 2:
        try:
            sums, weights = (_as_array(item) for item in returned)
        except (TypeError, ValueError):
            pass
        else:
            if sums.shape == weights.shape == (windows,):
                return sums, weights
    raise InvalidInput(
        f"objective.loss: {source} returned {_described(returned)} for a batch of {windows} "
        f"windows; its signature is {SIGNATURE}"
    )


def _described(value: object) -> str:
    if isinstance(value, tuple | list):
        return f"({', '.join(_described(item) for item in value)})"
    shape = getattr(value, "shape", None)
    return type(value).__name__ + (f" {list(shape)}" if shape is not None else "")


def _as_array(value: object) -> NDArray[np.float64]:
    plain = value.detach().double().numpy() if isinstance(value, Tensor) else value
    return np.atleast_1d(np.asarray(plain, dtype=np.float64))


def dense_loss(objective: Objective, output: Any, batch: Batch) -> float:
    """The dense model's own loss.

    Raises:
        InvalidInput: it is not finite, or nothing is scored.
    """
    sums, weights = objective.measure(output, batch, output)
    if not (np.isfinite(sums).all() and np.isfinite(weights).all() and weights.sum() > 0):
        raise InvalidInput(
            "objective.loss: the dense model's loss on the search data is not finite: its weights, "
            "the data or the loss hold what is no number"
        )
    return float(sums.sum() / weights.sum())


def scored_logits(output: Any) -> Tensor:
    """Logits of the scored positions, [windows, positions, classes].

    The last prediction of a language model is not scored: its token lies outside of the window.

    Raises:
        InvalidInput: the output has another form.
    """
    logits = getattr(output, "logits", output)
    if isinstance(logits, Tensor) and logits.ndim == 3:
        return logits[:, :-1] if logits is not output else logits
    if isinstance(logits, Tensor) and logits.ndim == 2:
        return logits[:, None]
    raise InvalidInput(
        f"objective.loss: {_described(output)} is no output to score; {SCORED}; for others write "
        f"python:file.py:function, {SIGNATURE}"
    )


def _kl(output: Any, batch: Batch, reference: Any) -> PerWindow:
    """KL(reference || output) in nats, full vocabulary, float32."""
    dense, other = scored_logits(reference), scored_logits(output)
    windows, positions, classes = dense.shape
    step = max(1, ENTRIES_AT_ONCE // (positions * classes))
    pairs = zip(torch.split(dense, step), torch.split(other, step), strict=True)
    sums = [_kl_sums(p, q) for p, q in pairs]
    return torch.cat(sums).numpy(), np.full(windows, float(positions))


def _kl_sums(dense: Tensor, other: Tensor) -> Tensor:
    """Logits [windows, positions, classes] -> float64 [windows]."""
    log_p, log_q = log_softmax(dense.float(), -1), log_softmax(other.float(), -1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).double().sum(-1)


def negative_log_likelihood(output: Any, batch: Batch, reference: Any = None) -> PerWindow:
    """Nats of each next token; perplexity is the exponential of their mean."""
    logits, ids = scored_logits(output), _token_ids(batch)
    if ids.ndim != 2 or logits.shape[1] != ids.shape[1] - 1:
        raise InvalidInput("objective.loss: perplexity needs a model that predicts each next token")
    sums = [
        -log_softmax(row.float(), -1).gather(-1, tokens[1:, None]).double().sum()
        for row, tokens in zip(logits, ids, strict=True)
    ]
    return torch.stack(sums).numpy(), np.full(len(ids), float(logits.shape[1]))


def _errors(output: Any, batch: Batch, reference: Any) -> PerWindow:
    """Wrong answers among the labeled ones."""
    labels = _labels(batch)
    answers = main_tensor(output).argmax(-1)
    if answers.shape != labels.shape:
        raise InvalidInput(
            f"objective.loss: accuracy got answers {list(answers.shape)} for labels "
            f"{list(labels.shape)}; the model must return [windows, classes]"
        )
    counted = (labels != IGNORED_LABEL).reshape(len(labels), -1)
    wrong = (answers != labels).reshape(len(labels), -1) & counted
    return wrong.sum(-1).double().numpy(), counted.sum(-1).double().numpy()


def _token_ids(batch: Batch) -> Tensor:
    if isinstance(batch, dict):
        if "input_ids" not in batch:
            raise InvalidInput('objective.loss: perplexity needs "input_ids" in each batch')
        return batch["input_ids"]
    return batch[0] if isinstance(batch, tuple) else batch


def _labels(batch: Batch) -> Tensor:
    if isinstance(batch, dict) and LABELS in batch:
        return batch[LABELS]
    if isinstance(batch, tuple) and len(batch) > 1:
        return batch[-1]
    raise InvalidInput(
        f'objective.loss: accuracy needs labels: the key "{LABELS}" of a dict batch, or the last '
        "item of a tuple"
    )


def _without_labels(batch: Batch) -> Batch:
    _labels(batch)
    if isinstance(batch, dict):
        return {name: tensor for name, tensor in batch.items() if name != LABELS}
    return batch[:-1]
