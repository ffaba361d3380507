"""Any format as a dense matrix in one floating dtype, unpacked when the operator is built."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from apportion.kernels.formats import Format, LayerShape, StoredWeight
from apportion.kernels.group import joined_bias
from apportion.kernels.reference import reference_weight

Refuses = Callable[[Format, Sequence[LayerShape], str], str | None]
Build = Callable[[Sequence[StoredWeight], Sequence[Tensor | None]], nn.Module]


class DenseLinear(nn.Module):
    """x [..., in] -> one [..., out] per member; multiplies in `dtype`, keeps the dtype of x."""

    weight: Tensor
    bias: Tensor | None

    def __init__(
        self,
        weights: Sequence[StoredWeight],
        biases: Sequence[Tensor | None],
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.sizes = [weight.shape.out_features for weight in weights]
        matrix = torch.cat([reference_weight(weight).to(dtype) for weight in weights])
        bias = joined_bias(biases, self.sizes)
        self.register_buffer("weight", matrix)
        self.register_buffer("bias", None if bias is None else bias.to(dtype))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = functional.linear(x.to(self.weight.dtype), self.weight, self.bias).to(x.dtype)
        return y.split_with_sizes(self.sizes, dim=-1)


def dense_linear(dtype: torch.dtype) -> tuple[Refuses, Build]:
    """What the registry needs of the dense operator in `dtype`."""

    def refuses(format: Format, shapes: Sequence[LayerShape], device: str) -> str | None:
        return refuses_convolutions(shapes) or refuses_dtype(format, dtype)

    return refuses, lambda weights, biases: DenseLinear(weights, biases, dtype)


def refuses_convolutions(shapes: Sequence[LayerShape]) -> str | None:
    """The reason for which an operator on matrices does not serve these layers, if there is one."""
    return "is for linear layers, not convolutions" if any(s.conv for s in shapes) else None


def refuses_dtype(format: Format, dtype: torch.dtype) -> str | None:
    """The reason for which floating arithmetic in `dtype` does not serve a format, if there is one.

    A format is served in its own dtype; integer weights in bfloat16 too, which is within the
    tolerance of what they lost.
    """
    if format.activation_bits is not None:
        return "does not quantize activations"
    if dtype == format.torch_dtype or (dtype == torch.bfloat16 and format.bits is not None):
        return None
    name = str(dtype).removeprefix("torch.")
    return f"computes in {name}; the format asks for {format.dtype}"
