"""A low-rank repair of what quantizing or pruning lost."""

import torch
from torch import Tensor

from apportion.spaces.compressors.factorize import low_rank


def residual_pair(
    weight: Tensor, stored: Tensor, rank: int, second_moment: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(left [out, rank], right [rank, in]) bfloat16: `stored + left @ right` is near `weight`.

    Each component's singular value is shared evenly between both factors.

    Args:
        weight: [out, in], what should have been stored.
        stored: float32 [out, in], what the steps before stored.
        rank: At most min(out, in).
        second_moment: float64 [in, in] whose norm weighs the error, or None: all inputs alike.
    """
    lost = weight.to(torch.float64, copy=True).sub_(stored)
    left, right = low_rank(lost, rank, second_moment)
    share = right.norm(dim=1).sqrt()
    safe = torch.where(share > 0, share, 1)
    return (left * safe).bfloat16(), (right / safe[:, None]).bfloat16()
