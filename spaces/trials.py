"""Sub-blocks tried out: run on what they were given once, and compared."""

import copy
import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from apportion.spaces.activations import changed
from apportion.spaces.batches import main_tensor
from apportion.spaces.probing import Call

TOLERANCE = 1e-4
"""Of an output's norm in float32: what the same sums in another order may differ by."""
NO_CHANGE = 1e-6
"""Of an output's norm: a smaller change may be rounding, and shows nothing."""

Run = Callable[[Callable[..., Any]], Tensor]


class NotRun(Exception):
    """A sub-block's own code failed; says how."""


def difference(dense: Tensor, expected: Tensor, given: Tensor) -> str | None:
    """What is wrong with the output of a narrower sub-block; None: it is as it should be.

    Args:
        dense: the output of the dense one.
        expected: that of the dense one without the units that the narrower one lacks.
        given: that of the narrower one.
    """
    change, size = float((expected - dense).norm()), float(dense.norm())
    if change <= NO_CHANGE * size:
        return "its output is the same, so nothing is proven"
    same_shape = given.shape == expected.shape
    error = float((given - expected).norm()) if same_shape else math.inf
    if not error <= min(TOLERANCE * size, change / 10):
        return "it does not give what it gives without the others, but depends on them"
    return None


def in_float32(module: nn.Module) -> nn.Module:
    """The module, or a copy where it computes in fewer bits."""
    tensors = itertools.chain(module.parameters(), module.buffers())
    return copy.deepcopy(module).float() if any(map(_is_short, tensors)) else module


def _is_short(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.element_size() < 4


def runner(call: Call) -> Run:
    """Runs a module on what it was given, in float32 and with noise, and without a cache.

    The noise, because tokens may be the same at all places: attention then does not show which
    queries and keys it takes. A cache holds what the probing run left in it.
    """
    noise = torch.randn(call.input.shape, generator=torch.Generator().manual_seed(0))

    def prepared(tensor: Tensor) -> Tensor:
        given = tensor.detach().float() if _is_short(tensor) else tensor.detach()
        if tensor is call.input and tensor.is_floating_point():
            return given + noise.to(given) * (float(given.std()) or 1)
        return given

    args = [None if is_cache(value) else value for value in call.args]
    keywords = {n: None if is_cache(value) else value for n, value in call.keywords.items()}
    given = changed([args, keywords], prepared)

    def run(forward: Callable[..., Any]) -> Tensor:
        # Clones, because the forward may change what it is given in place.
        args, keywords = changed(given, Tensor.clone)
        try:
            return main_tensor(forward(*args, **keywords))
        except Exception as error:
            told = str(error).strip().partition("\n")[0]
            raise NotRun(f"{type(error).__name__}: {told}") from error

    return run


def is_cache(value: Any) -> bool:
    """Whether a value is a key-value cache of transformers."""
    return hasattr(value, "get_seq_length")
