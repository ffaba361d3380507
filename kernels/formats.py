"""How a compressed layer is stored: its shape, its format, its tensors and their bytes.

The tensors of a `StoredWeight` for a matrix [out, in], by format:

| format | tensors |
|---|---|
| plain | `weight` [out, in] in `dtype` |
| sparse | `mask` uint8 [ceil(out * in / 8)], `values` [nonzeros] in `dtype`, row by row |
| integers | `codes` uint8 [ceil(n * bits / 8)], of ternary [ceil(n / 5)], n = out * in (when sparse: the nonzeros, and `mask`), `scale` bfloat16 [out, groups], `zero` bfloat16 [out, groups] unless symmetric |
| scaled inputs, with integers but not with integer activations | `input_scale` bfloat16 [in], which the inputs are multiplied by before they meet the codes |
| static activations, with integer activations | `activation_scale` float32 [1], the one scale of all inputs; 0: calibration saw none but zeros, and each token has its own |
| outliers, with integers below 8 bits | `outlier_values` bfloat16 [n], row by row, in place of what their codes stand for; `outlier_places` uint8 [n] and `outlier_counts` uint8 [ceil((n + ceil(out * in / 256)) / 8)], where they stand (`kernels.positions`) |
| low rank | `left` [out, rank] and `right` [rank, in] in `dtype` |
| Tucker-2, of a convolution | `left` [out, rank], `core` [rank, input_rank * kernel positions] and `right` [input_rank, channels] in `dtype` |
| residual, with any but low rank | `residual_left` [out, k] and `residual_right` [k, in] in bfloat16 |

An integer code q stands for w = (q - 2^(bits - 1)) * scale + zero, a ternary one for
w = (q - 1) * scale. With scaled inputs that is multiplied by `input_scale` of its input; outliers
and residual are not.
"""  # noqa: E501 (a table row cannot be broken)

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

import torch
from torch import Tensor

from apportion.errors import InvalidInput
from apportion.kernels.codes import CODE_BITS, TERNARY_BITS
from apportion.kernels.packing import packed_bytes, unpack_mask
from apportion.kernels.positions import counts_bytes

DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

LATER_FIELDS = ("input_rank", "outliers", "input_scaled", "static_activations")


@dataclass(frozen=True)
class ConvGeometry:
    """How a two-dimensional convolution moves over its input, in pixels (rows, columns)."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int = 1


@dataclass(frozen=True)
class LayerShape:
    """A layer as a matrix [out_features, in_features].

    Of a convolution, in_features = in_channels / groups * kernel rows * kernel columns.
    """

    out_features: int
    in_features: int
    conv: ConvGeometry | None = None

    @property
    def weights(self) -> int:
        """The number of entries of the dense matrix."""
        return self.out_features * self.in_features

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        conv = value.get("conv")
        geometry = None if conv is None else ConvGeometry(**_pairs_as_tuples(conv))
        return cls(value["out_features"], value["in_features"], geometry)


@dataclass(frozen=True)
class Format:
    """How one layer is stored and computed.

    Args:
        dtype: "float32", "bfloat16" or "float16": of what is not integer, and of the computation.
        bits: Bits per integer code, one of `CODE_BITS` (1.58: ternary); None: no integers.
        group: Inputs that share a scale; None: one scale per output row.
        symmetric: Codes have no zero; ternary ones never have.
        activation_bits: 8: inputs are quantized, per token if not static; None: they are not.
        sparse: Only the nonzeros are stored, with a mask.
        rank: Inner dimension of a low-rank pair that stands for the matrix; None: no pair.
        residual_rank: Inner dimension of a pair that is added to the rest; None: no residual.
        input_rank: Input channels of the core of a convolution's Tucker form, whose output channels
            are `rank`; None: no such form.
        outliers: How many weights are kept in bfloat16 and not as codes; None: none.
        input_scaled: Inputs are multiplied by scales of their own before they meet the codes.
        static_activations: Integer activations have one scale, which calibration has fixed.

    Raises:
        InvalidInput: If the parts do not fit each other.
    """

    dtype: str
    bits: float | None = None
    group: int | None = None
    symmetric: bool = False
    activation_bits: int | None = None
    sparse: bool = False
    rank: int | None = None
    residual_rank: int | None = None
    input_rank: int | None = None
    outliers: int | None = None
    input_scaled: bool = False
    static_activations: bool = False

    def __post_init__(self) -> None:
        if reason := _contradiction(self):
            raise InvalidInput(f"format: {reason}")

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    def groups(self, in_features: int) -> int:
        """Scales per output row. Raises InvalidInput where the group does not divide the inputs."""
        if self.group is None:
            return 1
        if in_features % self.group:
            raise InvalidInput(f"group {self.group} does not divide {in_features} inputs")
        return in_features // self.group

    def to_json(self) -> dict[str, Any]:
        """All fields, but for later ones that say nothing: keys made before them stay."""
        value = asdict(self)
        return {k: v for k, v in value.items() if v or k not in LATER_FIELDS}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Inverse of `to_json`. Raises InvalidInput on fields it does not know."""
        known = [field.name for field in fields(cls)]
        if unknown := sorted(set(value) - set(known)):
            raise InvalidInput(f"format: unknown field {unknown[0]!r}; known: {', '.join(known)}")
        return cls(**value)


@dataclass(frozen=True)
class StoredWeight:
    """One compressed weight; the module's table says which tensors it holds.

    Raises:
        InvalidInput: If a tensor is missing, unknown, or of another dtype or shape.
    """

    format: Format
    shape: LayerShape
    tensors: dict[str, Tensor]

    def __post_init__(self) -> None:
        wanted = layout(self.format, self.shape, self.nonzeros)
        if wrong := sorted(set(wanted) ^ set(self.tensors)):
            raise InvalidInput(
                f"stored weight: holds {sorted(self.tensors)}, not {sorted(wanted)}: {wrong[0]!r}"
            )
        for name, (dtype, size) in wanted.items():
            tensor = self.tensors[name]
            if tensor.dtype != dtype or tuple(tensor.shape) != size:
                found = f"{tensor.dtype} {list(tensor.shape)}"
                raise InvalidInput(f"stored weight: {name} is {found}, not {dtype} {list(size)}")

    @property
    def nonzeros(self) -> int | None:
        """Stored entries of a sparse weight, from its mask; None for any other."""
        if not self.format.sparse:
            return None
        mask = self.tensors.get("mask")
        if mask is None:
            raise InvalidInput("stored weight: a sparse one needs its mask")
        return int(unpack_mask(mask, self.shape.weights).sum())


def layout(
    format: Format, shape: LayerShape, nonzeros: int | None = None
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Name, dtype and shape of every tensor that stores one weight; arguments as `stored_bytes`."""
    out, inputs, dtype = shape.out_features, shape.in_features, format.torch_dtype
    if format.rank is not None and format.input_rank is not None:
        channels, positions = _channels(shape)
        return {
            "left": (dtype, (out, format.rank)),
            "core": (dtype, (format.rank, format.input_rank * positions)),
            "right": (dtype, (format.input_rank, channels)),
        }
    if format.rank is not None:
        return {"left": (dtype, (out, format.rank)), "right": (dtype, (format.rank, inputs))}
    tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    entries = shape.weights
    if format.sparse:
        if nonzeros is None:
            raise InvalidInput("format: a sparse weight is sized by its number of nonzeros")
        tensors["mask"] = (torch.uint8, (packed_bytes(shape.weights, 1),))
        entries = nonzeros
    if format.bits is not None:
        tensors["codes"] = (torch.uint8, (packed_bytes(entries, format.bits),))
        scales = (torch.bfloat16, (out, format.groups(inputs)))
        tensors |= {"scale": scales} if format.symmetric else {"scale": scales, "zero": scales}
        tensors |= {"input_scale": (torch.bfloat16, (inputs,))} if format.input_scaled else {}
        tensors |= {"activation_scale": (torch.float32, (1,))} if format.static_activations else {}
    elif format.sparse:
        tensors["values"] = (dtype, (entries,))
    else:
        tensors["weight"] = (dtype, (out, inputs))
    if count := format.outliers:
        tensors["outlier_values"] = (torch.bfloat16, (count,))
        tensors["outlier_places"] = (torch.uint8, (count,))
        tensors["outlier_counts"] = (torch.uint8, (counts_bytes(count, shape.weights),))
    if rank := format.residual_rank:
        tensors["residual_left"] = (torch.bfloat16, (out, rank))
        tensors["residual_right"] = (torch.bfloat16, (rank, inputs))
    return tensors


def stored_bytes(format: Format, shape: LayerShape, nonzeros: int | None = None) -> int:
    """Payload of the tensors of one stored weight, in bytes.

    Args:
        format: How the weight is stored.
        shape: The layer.
        nonzeros: Stored entries of a sparse format; None for any other.

    Raises:
        InvalidInput: If a sparse format comes without `nonzeros`, or the group does not fit.
    """
    tensors = layout(format, shape, nonzeros)
    return sum(math.prod(size) * dtype.itemsize for dtype, size in tensors.values())


def _channels(shape: LayerShape) -> tuple[int, int]:
    """(input channels, positions of the kernel) of a convolution in Tucker's form."""
    if shape.conv is None or shape.conv.groups > 1:
        raise InvalidInput("format: Tucker's form is for convolutions without groups")
    positions = math.prod(shape.conv.kernel)
    return shape.in_features // positions, positions


def _contradiction(format: Format) -> str | None:
    if format.dtype not in DTYPES:
        return f"dtype {format.dtype!r} is unknown; known: {', '.join(DTYPES)}"
    if format.bits is not None and format.bits not in CODE_BITS:
        return f"{format.bits} bits are not stored; known: {', '.join(map(str, CODE_BITS))}"
    if format.bits is None and (format.group or format.symmetric or format.activation_bits):
        return "groups, symmetry and integer activations need integer weights"
    if format.input_scaled and (format.bits is None or format.activation_bits is not None):
        return "scaled inputs need integer weights, and no integer activations"
    if format.bits == TERNARY_BITS and not format.symmetric:
        return "ternary codes have no zero: they are symmetric"
    if format.group is not None and format.group < 1:
        return f"group {format.group} is not positive"
    if format.static_activations and format.activation_bits is None:
        return "a static scale of the activations needs integer activations"
    if format.activation_bits is not None:
        exact = format.activation_bits == 8 and format.bits == 8 and format.symmetric
        if not exact or format.group is not None or format.sparse or format.residual_rank:
            return "integer activations need 8 bits, symmetric 8-bit weights and nothing else"
    if format.outliers is not None and (format.bits is None or format.bits == 8):
        return "outliers are kept from weights of less than 8 bits"
    if format.outliers is not None and format.outliers < 1:
        return f"{format.outliers} outliers are not a positive number"
    if format.input_rank is not None and format.rank is None:
        return "a rank of the input channels needs one of the output channels"
    if format.rank is not None and (format.bits or format.sparse or format.residual_rank):
        return "a low-rank pair combines with nothing else"
    return None


def _pairs_as_tuples(value: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(item) if isinstance(item, list) else item for key, item in value.items()}
