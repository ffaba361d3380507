"""Integer weights that stay integers while they run, on torch's CPU operators."""

import copy
import math
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from apportion.errors import InvalidInput
from apportion.kernels.dense_linear import refuses_convolutions
from apportion.kernels.formats import Format, LayerShape, StoredWeight
from apportion.kernels.group import joined_bias
from apportion.kernels.reference import (
    ACTIVATION_LEVELS,
    activation_scale,
    reference_layer,
    weight_codes,
)

INT4_GROUPS = (32, 64, 128)
INT4_ROWS = 16
INT4_INNER_TILES = 2
INT8_INPUTS = 16
# oneDNN is fast for unsigned activations only: int8 shifted up by this.
ZERO_POINT = 128
VNNI = ("avx512_vnni", "avx_vnni")
# Added to a small float32, the sum is rounded to a whole number (ties to even) that stands in its
# lowest bits; with the zero point on top, the lowest byte is the unsigned code.
TO_LOW_BYTE = 1.5 * 2**23 + ZERO_POINT
# Of floats above zero larger ones have larger bits, and of those below zero all bits are negative
# integers: so a range can be kept on the bits, where it costs less.
LEAST_BITS, MOST_BITS = (
    torch.tensor([TO_LOW_BYTE - ACTIVATION_LEVELS, TO_LOW_BYTE + ACTIVATION_LEVELS])
    .view(torch.int32)
    .tolist()
)


class Int4Linear(nn.Module):
    """x [..., in] -> one [..., out] per member: 4-bit codes, unpacked as they are multiplied."""

    packed: Tensor
    scale_and_zero: Tensor
    bias: Tensor | None

    def __init__(self, weights: Sequence[StoredWeight], biases: Sequence[Tensor | None]) -> None:
        super().__init__()
        self.sizes = [weight.shape.out_features for weight in weights]
        self.group = weights[0].format.group
        codes = torch.cat([weight_codes(weight) for weight in weights]).to(torch.int32) + 8
        scales, zeros = (
            torch.cat([weight.tensors[name] for weight in weights]) for name in ("scale", "zero")
        )
        pack = torch.ops.aten._convert_weight_to_int4pack_for_cpu
        self.register_buffer("packed", pack(codes, INT4_INNER_TILES))
        pairs = torch.stack([scales.t(), zeros.t()], dim=-1)
        self.register_buffer("scale_and_zero", pairs.contiguous())
        self.register_buffer("bias", _bfloat16(joined_bias(biases, self.sizes)))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        multiply = torch.ops.aten._weight_int4pack_mm_for_cpu
        y = multiply(_bfloat16_rows(x), self.packed, self.group, self.scale_and_zero)
        return _parts(y, self.bias, x, self.sizes)


class Int8Linear(nn.Module):
    """x [..., in] -> one [..., out] per member: 8-bit codes, bfloat16 activations."""

    codes: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, weights: Sequence[StoredWeight], biases: Sequence[Tensor | None]) -> None:
        super().__init__()
        self.sizes = [weight.shape.out_features for weight in weights]
        codes = torch.cat([weight_codes(weight) for weight in weights])
        self.register_buffer("codes", codes.to(torch.int8))
        self.register_buffer("scale", torch.cat([w.tensors["scale"][:, 0] for w in weights]))
        self.register_buffer("bias", _bfloat16(joined_bias(biases, self.sizes)))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = torch.ops.aten._weight_int8pack_mm(_bfloat16_rows(x), self.codes, self.scale)
        return _parts(y, self.bias, x, self.sizes)


class Int8ActivationLinear(nn.Module):
    """x [..., in] -> one [..., out] per member: int8 by int8 with one scale per token.

    The members' activations are quantized once.
    """

    packed: Tensor
    scale: Tensor
    zero: Tensor
    bias: Tensor | None

    def __init__(self, weights: Sequence[StoredWeight], biases: Sequence[Tensor | None]) -> None:
        super().__init__()
        self.sizes = [weight.shape.out_features for weight in weights]
        codes = torch.cat([weight_codes(weight) for weight in weights]).to(torch.int8)
        scale = torch.cat([weight.tensors["scale"][:, 0] for weight in weights]).float()
        self.register_buffer("packed", torch.ops.onednn.qlinear_prepack(codes, None))
        self.register_buffer("scale", scale)
        self.register_buffer("zero", torch.zeros(len(codes), dtype=torch.int64))
        self.register_buffer("bias", joined_bias(biases, self.sizes))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        codes, token_scale = unsigned_tokens(_float32_rows(x))
        y = self._product(codes, 1.0).mul_(token_scale)
        return _parts(y, self.bias, x, self.sizes)

    def _product(self, codes: Tensor, scale: float) -> Tensor:
        """Unsigned codes [tokens, in] of one scale -> float32 [tokens, all outputs]."""
        y: Tensor = torch.ops.onednn.qlinear_pointwise.default(
            codes, scale, ZERO_POINT, self.packed, self.scale, self.zero, None,
            1.0, 0, torch.float32, "none", [], "",
        )  # fmt: skip
        return y

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        # torch cannot deep-copy oneDNN's layout, but it can clone it.
        memo[id(self.packed)] = self.packed.clone()
        copied = self.__new__(type(self))
        memo[id(self)] = copied
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied


class StaticInt8ActivationLinear(Int8ActivationLinear):
    """x [..., in] -> one [..., out] per member: int8 by int8, activations by one fixed scale."""

    def __init__(
        self, weights: Sequence[StoredWeight], biases: Sequence[Tensor | None], scale: float
    ) -> None:
        super().__init__(weights, biases)
        self.activation_scale = scale

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        rows = _float32_rows(x)
        y = self._product(unsigned_codes(rows, self.activation_scale), self.activation_scale)
        # Codes keep nothing of a NaN. A sum is finite wherever all of it is, unless it is huge.
        if not math.isfinite(rows.sum()):
            y.masked_fill_(~rows.isfinite().all(-1, keepdim=True), torch.nan)
        return _parts(y, self.bias, x, self.sizes)


def int8_activation_linear(
    weights: Sequence[StoredWeight], biases: Sequence[Tensor | None]
) -> Int8ActivationLinear:
    """The operator with int8 activations: with the members' fixed scale, or with one per token.

    Raises:
        InvalidInput: The members' scales differ, though they share their input.
    """
    found = [activation_scale(weight) for weight in weights]
    scales = {None if scale is None else float(scale) for scale in found}
    if len(scales) != 1:
        raise InvalidInput("int8.onednn: the layers of a group have one scale of their input")
    (scale,) = scales
    if scale is None:
        return Int8ActivationLinear(weights, biases)
    return StaticInt8ActivationLinear(weights, biases, scale)


def unsigned_codes(x: Tensor, scale: float) -> Tensor:
    """`quantize_by` of float32 [tokens, in], as uint8 codes with zero point 128.

    Codes of what is not finite are arbitrary.
    """
    bits = x.div(scale).add_(TO_LOW_BYTE).view(torch.int32)
    return bits.clamp_(LEAST_BITS, MOST_BITS).to(torch.uint8)


def unsigned_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """`quantize_tokens` of float32 [tokens, in], as uint8 codes with zero point 128, and scales.

    A row of zeros divides by zero, so its codes are arbitrary; its scale 0 makes its output 0.
    """
    scale = x.abs().amax(-1, keepdim=True).div_(ACTIVATION_LEVELS)
    # Integers are narrowed by their lowest byte, and faster than floats are converted.
    return x.div(scale).add_(TO_LOW_BYTE).view(torch.int32).to(torch.uint8), scale


def refuses_int4(format: Format, shapes: Sequence[LayerShape], device: str) -> str | None:
    """Why the 4-bit operator does not serve, if it does not."""
    if reason := _refuses_integers(format, shapes, bits=4):
        return reason
    if format.activation_bits is not None or format.symmetric:
        return "needs a zero per group"
    if format.group not in INT4_GROUPS:
        return f"needs groups of {', '.join(map(str, INT4_GROUPS))} inputs"
    outputs = [shape.out_features for shape in shapes]
    # Members that scale their inputs, each in its own way, run alone.
    for multiplied in outputs if format.input_scaled else [sum(outputs)]:
        if multiplied % INT4_ROWS:
            return f"needs a multiple of {INT4_ROWS} outputs, not {multiplied}"
    return None


def refuses_int8(format: Format, shapes: Sequence[LayerShape], device: str) -> str | None:
    """Why the 8-bit operator with bfloat16 activations does not serve, if it does not."""
    if format.activation_bits is not None:
        return "does not quantize activations"
    if reason := _refuses_integers(format, shapes, bits=8) or _refuses_scales(format):
        return reason
    # torch's operator crashes on others, as soon as there are several rows
    is_served = all(shape.in_features % INT8_INPUTS == 0 for shape in shapes)
    return None if is_served else f"needs inputs in multiples of {INT8_INPUTS}"


def refuses_int8_activations(
    format: Format, shapes: Sequence[LayerShape], device: str
) -> str | None:
    """Why the operator with int8 activations does not serve, if it does not."""
    if format.activation_bits is None:
        return "is for integer activations"
    if reason := _refuses_integers(format, shapes, bits=8) or _refuses_scales(format):
        return reason
    capabilities = torch.cpu.get_capabilities()
    if not torch._C._has_mkldnn or not any(capabilities.get(name) for name in VNNI):
        # Without them oneDNN adds pairs of products in 16 bits, which saturates.
        return "needs a CPU with VNNI instructions and oneDNN, or its sums are not exact"
    return None


class ReferenceInt8(nn.Module):
    """x -> one output per member, by the definition of integer activations: exact and slow.

    What an option with integer activations runs as where nothing faster serves it.
    """

    def __init__(self, weights: Sequence[StoredWeight], biases: Sequence[Tensor | None]) -> None:
        super().__init__()
        pairs = zip(weights, biases, strict=True)
        self.layers = nn.ModuleList(reference_layer(weight, bias) for weight, bias in pairs)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(layer(x) for layer in self.layers)


def refuses_reference_int8(format: Format, shapes: Sequence[LayerShape], device: str) -> str | None:
    """Why the definition itself does not serve: no integer activations, or a faster one does."""
    if format.activation_bits is None:
        return "is for integer activations"
    if refuses_int8_activations(format, shapes, device) is None:
        return "is for layers that int8.onednn does not serve"
    return None


def _refuses_integers(format: Format, shapes: Sequence[LayerShape], bits: int) -> str | None:
    if format.bits != bits:
        return f"is for {bits}-bit weights"
    if format.sparse or format.residual_rank or format.outliers:
        return "takes neither masks nor outliers nor residuals"
    return refuses_convolutions(shapes)


def _refuses_scales(format: Format) -> str | None:
    return None if format.symmetric and format.group is None else "needs one scale per output"


def _bfloat16(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.to(torch.bfloat16)


def _bfloat16_rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).to(torch.bfloat16).contiguous()


def _float32_rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).float().contiguous()


def _parts(y: Tensor, bias: Tensor | None, x: Tensor, sizes: list[int]) -> tuple[Tensor, ...]:
    """Rows [tokens, all outputs] as what the members give for x."""
    if bias is not None:
        y = y.add_(bias)
    y = y.to(x.dtype).view(x.shape[:-1] + y.shape[-1:])
    return y.split_with_sizes(sizes, dim=-1)
