"""What every format means, in plain torch: the definition that fast implementations are held to."""

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from apportion.errors import ApportionError
from apportion.kernels.codes import middle
from apportion.kernels.formats import ConvGeometry, Format, LayerShape, StoredWeight
from apportion.kernels.packing import unpack_codes, unpack_mask
from apportion.kernels.positions import unpack_positions

ACTIVATION_LEVELS = 127
SMALLEST_SCALE = torch.finfo(torch.float32).tiny
CODE_LIMIT = 128
MANTISSA_BITS = 24
ABOVE_EXPONENTS = 200
# 128 * 127 * 1024 < 2^24: so many products of two int8 sum up exactly in float32, in any order.
EXACT_INPUTS = 1024


def reference_weight(stored: StoredWeight) -> Tensor:
    """The dense matrix that a stored weight stands for, float32 [out, in]."""
    tensors = stored.tensors
    if stored.format.input_rank is not None:
        left, core, right = (tensors[name].double() for name in ("left", "core", "right"))
        kernel = core.view(len(core), len(right), -1)
        return torch.einsum("or,rip,ic->ocp", left, kernel, right).flatten(1).float()
    if stored.format.rank is not None:
        return tensors["left"].float() @ tensors["right"].float()
    weight = _integer_weight(stored) if stored.format.bits else _plain_weight(stored)
    if stored.format.residual_rank:
        weight = weight + tensors["residual_left"].float() @ tensors["residual_right"].float()
    return weight


def weight_codes(stored: StoredWeight) -> Tensor:
    """Signed codes of an integer weight, int16 [out, in]: q - 2^(bits - 1), of ternary q - 1.

    0 where masked out.
    """
    bits = stored.format.bits
    if bits is None:
        raise ApportionError("a weight without integers has no codes")
    count = stored.shape.weights if stored.nonzeros is None else stored.nonzeros
    codes = unpack_codes(stored.tensors["codes"], bits, count).to(torch.int16) - middle(bits)
    return _spread(stored, codes)


def quantize_tokens(x: Tensor, dims: tuple[int, ...] = (-1,)) -> tuple[Tensor, Tensor]:
    """Symmetric int8 per token: whole numbers in [-127, 127] and the scale that gives x back.

    Args:
        x: Activations, any floating dtype.
        dims: The dimensions that make up one token.

    Returns:
        Whole numbers in float32, of the shape of x, and float32 scales, 1 in `dims`.
    """
    x = x.float()
    scale = (x.abs().amax(dims, keepdim=True) / ACTIVATION_LEVELS).clamp_min(SMALLEST_SCALE)
    return (x / scale).round(), scale


def quantize_by(x: Tensor, scale: Tensor) -> Tensor:
    """Symmetric int8 by a given scale: whole numbers in [-127, 127], the nearest beyond them.

    Args:
        x: Activations, any floating dtype.
        scale: float32 [1], above 0.

    Returns:
        Whole numbers in float32, of the shape of x; NaN where x is not finite.
    """
    x = x.float()
    codes = (x / scale).round().clamp(-ACTIVATION_LEVELS, ACTIVATION_LEVELS)
    return codes.masked_fill(~x.isfinite(), torch.nan)


def activation_scale(stored: StoredWeight) -> Tensor | None:
    """The one scale of all inputs, float32 [1]; None: each token has its own, or none is needed.

    A stored 0 says that calibration saw no input but zeros: then each token has its own.
    """
    if not stored.format.static_activations:
        return None
    scale = stored.tensors["activation_scale"]
    return scale if bool(scale > 0) else None


class ReferenceLayer(nn.Module):
    """One layer by its definition.

    Computes in `format.dtype` and returns the dtype of its input. With integer activations: int8
    by the given scale or per token (of a convolution: per image), exact sums, then float32 scales
    and bias.
    """

    weight: Tensor
    scale: Tensor
    activation_scale: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        format: Format,
        shape: LayerShape,
        activation_scale: Tensor | None = None,
    ) -> None:
        """Takes the dense weight, float32 [out, in], and the bias [out] or None.

        Args:
            weight: What the stored weight stands for.
            bias: Is added at the end.
            format: How the weight is stored.
            shape: The layer.
            activation_scale: float32 [1], of integer activations; None: each token has its own.
        """
        super().__init__()
        self.conv = shape.conv
        self.integer = format.activation_bits is not None
        dtype = torch.float32 if self.integer else format.torch_dtype
        weight, scale = integer_rows(weight) if self.integer else (weight.detach(), None)
        self.register_buffer("weight", as_kernel(weight.to(dtype), self.conv))
        self.register_buffer("scale", scale)
        self.register_buffer("activation_scale", activation_scale)
        self.register_buffer("bias", None if bias is None else bias.detach().to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]; a convolution [..., channels, rows, columns] alike."""
        if self.integer:
            return self._integer_forward(x)
        return apply_weight(x.to(self.weight.dtype), self.weight, self.bias, self.conv).to(x.dtype)

    def _integer_forward(self, x: Tensor) -> Tensor:
        if self.activation_scale is not None:
            codes, scale = quantize_by(x, self.activation_scale), self.activation_scale
        else:
            codes, scale = quantize_tokens(x, (-1,) if self.conv is None else (-3, -2, -1))
        trailing = () if self.conv is None else (1, 1)
        y = exact_sums(codes, self.weight, self.conv) * self.scale.view(-1, *trailing) * scale
        if self.bias is not None:
            y = y + self.bias.view(-1, *trailing)
        return y.to(x.dtype)


def reference_layer(stored: StoredWeight, bias: Tensor | None) -> ReferenceLayer:
    """A stored weight with its bias [out] or None as a layer, by its definition."""
    scale = activation_scale(stored)
    return ReferenceLayer(reference_weight(stored), bias, stored.format, stored.shape, scale)


def integer_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Splits rows scale * whole number, float32 [out, in], into whole numbers and scales [out].

    The greatest common divisor of a row's mantissas is a multiple of its scale's mantissa, so the
    whole numbers never exceed the codes that the row was made of.

    Raises:
        ApportionError: If a row is no multiple of at most 128 times one number.
    """
    rows = weight.detach().double().numpy()
    exponents = np.where(rows == 0, ABOVE_EXPONENTS, np.frexp(rows)[1])
    lowest = exponents.min(-1, keepdims=True) - MANTISSA_BITS
    whole = np.ldexp(rows, -lowest).astype(np.int64)
    divisor = np.gcd.reduce(whole, axis=-1, keepdims=True)
    codes = torch.from_numpy(whole // np.maximum(divisor, 1)).float()
    scale = torch.from_numpy(np.ldexp(divisor.astype(np.float64), lowest)).float()
    if bool((codes.abs() > CODE_LIMIT).any()) or not torch.equal(codes * scale, weight):
        raise ApportionError("integer activations need a weight of one 8-bit scale per row")
    return codes, scale.squeeze(-1)


def exact_sums(codes: Tensor, weight: Tensor, conv: ConvGeometry | None) -> Tensor:
    """Products of whole numbers in float32, each at most 128, summed without rounding."""
    if conv is not None:
        return apply_weight(codes.double(), weight.double(), None, conv).float()
    if weight.shape[-1] <= EXACT_INPUTS:
        return functional.linear(codes, weight)
    chunks = zip(
        torch.split(codes, EXACT_INPUTS, -1), torch.split(weight, EXACT_INPUTS, -1), strict=True
    )
    partial = [functional.linear(part, columns).double() for part, columns in chunks]
    return torch.stack(partial).sum(0).float()


def as_kernel(weight: Tensor, conv: ConvGeometry | None) -> Tensor:
    """The matrix [out, in] as what `apply_weight` takes: 4-dimensional for a convolution."""
    return weight if conv is None else weight.reshape(len(weight), -1, *conv.kernel)


def apply_weight(
    x: Tensor, weight: Tensor, bias: Tensor | None, conv: ConvGeometry | None
) -> Tensor:
    """The layer in the dtype of its arguments."""
    if conv is None:
        return functional.linear(x, weight, bias)
    return functional.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)


def _plain_weight(stored: StoredWeight) -> Tensor:
    if stored.format.sparse:
        return _spread(stored, stored.tensors["values"].float())
    return stored.tensors["weight"].float()


def _integer_weight(stored: StoredWeight) -> Tensor:
    out, inputs = stored.shape.out_features, stored.shape.in_features
    scale = stored.tensors["scale"].float()
    grouped = weight_codes(stored).float().view(out, scale.shape[1], -1) * scale[..., None]
    if not stored.format.symmetric:
        grouped = grouped + stored.tensors["zero"].float()[..., None]
    weight = grouped.view(out, inputs)
    if stored.format.input_scaled:
        weight = weight * stored.tensors["input_scale"].float()
    if stored.format.sparse:
        weight = weight.masked_fill(~_mask(stored), 0)
    if stored.format.outliers:
        weight = _with_outliers(stored, weight)
    return weight


def _with_outliers(stored: StoredWeight, weight: Tensor) -> Tensor:
    tensors = stored.tensors
    places, counts = tensors["outlier_places"], tensors["outlier_counts"]
    positions = unpack_positions(places, counts, stored.shape.weights)
    values = tensors["outlier_values"].float()
    return weight.flatten().index_copy(0, positions, values).view_as(weight)


def _spread(stored: StoredWeight, entries: Tensor) -> Tensor:
    """Stored entries as a matrix [out, in], zero where the mask has none."""
    out, inputs = stored.shape.out_features, stored.shape.in_features
    if not stored.format.sparse:
        return entries.view(out, inputs)
    return entries.new_zeros(out, inputs).masked_scatter_(_mask(stored), entries)


def _mask(stored: StoredWeight) -> Tensor:
    shape = stored.shape
    mask = unpack_mask(stored.tensors["mask"], shape.weights)
    return mask.view(shape.out_features, shape.in_features)
