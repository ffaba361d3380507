"""Batches: what one call of a model takes."""

from typing import Any

import torch
from torch import Tensor, nn

Batch = dict[str, Tensor] | tuple[Tensor, ...] | Tensor


def call(model: nn.Module, batch: Batch) -> Any:
    """Run the model on a batch: a dict as keywords, a tuple as arguments, a tensor alone."""
    if isinstance(batch, dict):
        return model(**batch)
    if isinstance(batch, tuple):
        return model(*batch)
    return model(batch)


def main_tensor(output: Any) -> Tensor:
    """The tensor that a module hands on: the output itself, `.logits`, or a tuple's first item.

    Raises:
        TypeError: the output holds no tensor there.
    """
    if isinstance(output, Tensor):
        return output
    logits = getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    if isinstance(output, tuple) and output and isinstance(output[0], Tensor):
        return output[0]
    raise TypeError(f"a {type(output).__name__} holds no tensor to follow")


def frozen(model: nn.Module) -> nn.Module:
    """The model in evaluation mode, its parameters without gradients."""
    return model.eval().requires_grad_(False)


# Not inference_mode: its tensors have no version, by which a fused group knows its input again.
no_gradients = torch.no_grad
