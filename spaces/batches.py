"""Batches: what one call of a model takes."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

Batch = dict[str, Tensor] | tuple[Tensor, ...] | Tensor


def call(model: Callable[..., Any], batch: Batch) -> Any:
    """Run the model on a batch: a dict as keywords, a tuple as arguments, a tensor alone."""
    if isinstance(batch, dict):
        return model(**batch)
    if isinstance(batch, tuple):
        return model(*batch)
    return model(batch)


def main_tensor(output: Any) -> Tensor:
    """The tensor that a module hands on.

    The output itself, `.logits`, or the first item of a tuple or of a mapping (transformers'
    outputs are mappings; an encoder's begins with `last_hidden_state`).

    Raises:
        TypeError: the output holds no tensor there.
    """
    if isinstance(output, Tensor):
        return output
    logits = getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    items = tuple(output.values()) if isinstance(output, Mapping) else output
    if isinstance(items, tuple) and items and isinstance(items[0], Tensor):
        return items[0]
    raise TypeError(f"a {type(output).__name__} holds no tensor to follow")


def frozen(model: nn.Module) -> nn.Module:
    """The model in evaluation mode, its parameters without gradients."""
    return model.eval().requires_grad_(False)


# Not inference_mode: its tensors have no version, by which a fused group knows its input again.
no_gradients = torch.no_grad
