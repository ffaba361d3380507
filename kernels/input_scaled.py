"""Inputs multiplied by scales of their own, ahead of an operator that knows of none."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from apportion.kernels.dense_linear import Build
from apportion.kernels.formats import StoredWeight


class InputScaled(nn.Module):
    """x [..., in] -> one [..., out] per member, each of which multiplies x by its own scales.

    So the members share no product, as they do where nothing is scaled.
    """

    input_scale: Tensor

    def __init__(
        self, weights: Sequence[StoredWeight], biases: Sequence[Tensor | None], operator: Build
    ) -> None:
        """`operator` builds what reads the codes alone, here for one member after another."""
        super().__init__()
        scales = [weight.tensors["input_scale"] for weight in weights]
        self.register_buffer("input_scale", torch.stack(scales))
        self.members = nn.ModuleList(
            operator([weight], [bias]) for weight, bias in zip(weights, biases, strict=True)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        pairs = zip(self.members, self.input_scale, strict=True)
        return tuple(member((x * scale).to(x.dtype))[0] for member, scale in pairs)


def input_scaled(operator: Build) -> Build:
    """The same operator, which serves scaled inputs too."""

    def build(weights: Sequence[StoredWeight], biases: Sequence[Tensor | None]) -> nn.Module:
        if weights[0].format.input_scaled:
            return InputScaled(weights, biases, operator)
        return operator(weights, biases)

    return build
