"""A low-rank pair as two thin matrix products: x -> right x -> left (right x)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from apportion.kernels.dense_linear import Build, Refuses, refuses_convolutions, refuses_dtype
from apportion.kernels.formats import Format, LayerShape, StoredWeight


class Factor(nn.Module):
    """The second product of one member: its left factor and its bias."""

    left: Tensor
    bias: Tensor | None

    def __init__(self, left: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("left", left)
        self.register_buffer("bias", None if bias is None else bias.detach().to(left.dtype))

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.left, self.bias)


class LowRankLinear(nn.Module):
    """x [..., in] -> one [..., out] per member; the members' first products are one."""

    right: Tensor

    def __init__(
        self,
        weights: Sequence[StoredWeight],
        biases: Sequence[Tensor | None],
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        rights = [weight.tensors["right"].to(dtype) for weight in weights]
        self.ranks = [len(right) for right in rights]
        self.register_buffer("right", torch.cat(rights))
        self.factors = nn.ModuleList(
            Factor(weight.tensors["left"].to(dtype), bias)
            for weight, bias in zip(weights, biases, strict=True)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        inner = functional.linear(x.to(self.right.dtype), self.right)
        pairs = zip(self.factors, inner.split_with_sizes(self.ranks, dim=-1), strict=True)
        return tuple(factor(part).to(x.dtype) for factor, part in pairs)


def low_rank_linear(dtype: torch.dtype) -> tuple[Refuses, Build]:
    """What the registry needs of the low-rank operator in `dtype`."""

    def refuses(format: Format, shapes: Sequence[LayerShape], device: str) -> str | None:
        if format.rank is None:
            return "is for low-rank pairs"
        return refuses_convolutions(shapes) or refuses_dtype(format, dtype)

    return refuses, lambda weights, biases: LowRankLinear(weights, biases, dtype)
