"""Convolutions: any format as a dense kernel, a low-rank pair as two convolutions, Tucker's form
as three."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from apportion.errors import ApportionError
from apportion.kernels.dense_linear import Build, Refuses, refuses_dtype
from apportion.kernels.formats import ConvGeometry, Format, LayerShape, StoredWeight
from apportion.kernels.reference import apply_weight, as_kernel, reference_weight

POINTWISE = ConvGeometry(kernel=(1, 1), stride=(1, 1), padding=(0, 0), dilation=(1, 1))


class Conv(nn.Module):
    """One convolution in one dtype."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, matrix: Tensor, bias: Tensor | None, geometry: ConvGeometry) -> None:
        """Takes the kernel as a matrix [out, in], in the dtype to compute in."""
        super().__init__()
        self.geometry = geometry
        self.register_buffer("weight", as_kernel(matrix, geometry))
        self.register_buffer("bias", None if bias is None else bias.detach().to(matrix.dtype))

    def forward(self, x: Tensor) -> Tensor:
        return apply_weight(x, self.weight, self.bias, self.geometry)


class GroupConv(nn.Module):
    """x [..., channels, rows, columns] -> one output per member; keeps the dtype of x."""

    def __init__(
        self,
        weights: Sequence[StoredWeight],
        biases: Sequence[Tensor | None],
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.dtype = dtype
        self.layers = nn.ModuleList(
            _conv(weight, bias, dtype) for weight, bias in zip(weights, biases, strict=True)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        cast = x.to(self.dtype)
        return tuple(layer(cast).to(x.dtype) for layer in self.layers)


def conv(dtype: torch.dtype) -> tuple[Refuses, Build]:
    """What the registry needs of the convolution in `dtype`."""

    def refuses(format: Format, shapes: Sequence[LayerShape], device: str) -> str | None:
        if any(shape.conv is None for shape in shapes):
            return "is for convolutions, not linear layers"
        return refuses_dtype(format, dtype)

    return refuses, lambda weights, biases: GroupConv(weights, biases, dtype)


def _conv(stored: StoredWeight, bias: Tensor | None, dtype: torch.dtype) -> nn.Module:
    geometry = stored.shape.conv
    if geometry is None:
        raise ApportionError("a linear layer was handed to a convolution")
    if stored.format.input_rank is not None:
        first, second, last = (stored.tensors[n].to(dtype) for n in ("right", "core", "left"))
        return nn.Sequential(
            Conv(first, None, POINTWISE), Conv(second, None, geometry), Conv(last, bias, POINTWISE)
        )
    # The right factor is common to all groups of channels: a grouped pair is no two convolutions.
    if stored.format.rank is None or geometry.groups > 1:
        return Conv(reference_weight(stored).to(dtype), bias, geometry)
    right = Conv(stored.tensors["right"].to(dtype), None, geometry)
    return nn.Sequential(right, Conv(stored.tensors["left"].to(dtype), bias, POINTWISE))
