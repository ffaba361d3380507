"""A norm that takes in what the inputs of the one site that reads it are multiplied by."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

KEPT = 1 / 8
"""Relative error of a rounded gain from which on it stays as it was: too coarse to be scaled."""


@dataclass(frozen=True)
class Norm:
    """A module that multiplies by a vector what one weight site alone is given (`spaces.norms`).

    Attributes:
        module: its path.
        vectors: names of its parameters `[in]`, all that it has: the gain, then the bias if any.
        offset: what is added to the gain before it multiplies: 1 in Gemma's norms, else 0.
    """

    module: str
    vectors: tuple[str, ...]
    offset: int = 0

    @property
    def paths(self) -> tuple[str, ...]:
        """Names of the vectors in the model's state."""
        return tuple(f"{self.module}.{name}" for name in self.vectors)


def fold(
    vectors: Sequence[Tensor], offset: int, wanted: Tensor
) -> tuple[tuple[Tensor, ...], Tensor]:
    """A norm's vectors with what its reader's inputs should be multiplied by, and what they are.

    The new gain is rounded to its dtype, so that the inputs are not multiplied by what was wanted
    but by new / old gain, and that is what has to be undone in the weights: nothing is lost by the
    rounding but of the bias. Where the gain would lose more than `KEPT` of it, it stays as it is.

    Args:
        vectors: [in] each, the gain and the bias, if any.
        offset: added to the gain before it multiplies.
        wanted: float64 [in], positive.

    Returns:
        The new vectors, in the dtypes of the old, and float32 [in].
    """
    gain = vectors[0].double() + offset
    rounded = (gain * wanted - offset).to(vectors[0].dtype)
    rate = (rounded.double() + offset) / gain
    # A gain of 0 stays 0 under any scale; its input is the bias alone.
    rate = torch.where(gain == 0, wanted, rate)
    fine = (rate / wanted - 1).abs() <= KEPT
    rate = torch.where(fine, rate, 1.0)
    biases = ((bias.double() * rate).to(bias.dtype) for bias in vectors[1:])
    return (torch.where(fine, rounded, vectors[0]), *biases), rate.float()


def folded_rate(old: Sequence[Tensor], new: Sequence[Tensor], offset: int) -> Tensor:
    """float32 [in]: what a norm's reader is given more under its new vectors than under the old.

    Where the gain is 0 the bias tells, and where that is 0 too it is 1.
    """
    rate = torch.ones_like(old[0], dtype=torch.float64)
    pairs = zip(old, new, (offset, *[0] * (len(old) - 1)), strict=True)
    for before, after, added in reversed(list(pairs)):
        divisor = before.double() + added
        rate = torch.where(divisor == 0, rate, (after.double() + added) / divisor)
    return rate.float()
