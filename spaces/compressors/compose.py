"""An option applied to one weight: which methods, in which order, stored how, or refused why."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from decimal import ROUND_CEILING, Decimal

import torch
from torch import Tensor

from apportion.errors import InvalidInput
from apportion.kernels.formats import Format, LayerShape, StoredWeight
from apportion.kernels.packing import pack_codes, pack_mask
from apportion.kernels.reference import reference_weight
from apportion.spaces.compressors.factorize import low_rank, rank_of
from apportion.spaces.compressors.gptq import gptq
from apportion.spaces.compressors.hqq import hqq
from apportion.spaces.compressors.quantize import Quantized, quantize
from apportion.spaces.compressors.residual import residual_pair
from apportion.spaces.compressors.sparsegpt import sparsegpt
from apportion.spaces.compressors.sparsify import keep_largest, keep_pattern, keep_wanda
from apportion.spaces.grammar import ALWAYS_SYMMETRIC, WITHOUT_STATISTICS, Option, unrealized

NAMED_DTYPES: Mapping[str, str] = {"f32": "float32", "bf16": "bfloat16", "fp16": "float16"}
DEFAULTS = {"s": "wanda", "r": "whitened", "w": "rtn", "residual": "whitened"}
FALLBACKS = {"s": "magnitude", "r": "svd", "w": "rtn", "residual": "svd"}
RANK_MULTIPLE = 8


@dataclass
class InputStatistics:
    """What calibration saw enter a layer.

    Args:
        second_moment: float64 [in, in], the sum of x x^T over tokens.
        tokens: How many tokens were summed.
    """

    second_moment: Tensor
    tokens: int


def effective_methods(option: Option, has_statistics: bool) -> dict[str, str]:
    """The method of every step: the one asked for, else the default.

    Defaults: s wanda, r and residual whitened, w rtn. Where a layer has no statistics (an unfolded
    convolution may have none) the defaults are s magnitude, r and residual svd, w rtn.

    Raises:
        InvalidInput: A method that needs statistics was asked for and there are none.
    """
    asked = dict(option.methods)
    for step, method in asked.items():
        if not has_statistics and method not in (*WITHOUT_STATISTICS, "rtn"):
            raise InvalidInput(
                f'option "{option}": {method} needs calibration statistics and this layer has none;'
                f" ask for {FALLBACKS[step]}, or for no method"
            )
    defaults = DEFAULTS if has_statistics else FALLBACKS
    return {step: asked.get(step, defaults[step]) for step in option.steps}


def refusal(option: Option, shape: LayerShape, rank_multiple: int = RANK_MULTIPLE) -> str | None:
    """Why `option` cannot be had for a layer of `shape`, with what fits; None if it can."""
    if reason := unrealized(option):
        return reason
    if option.is_structure:
        return f"{option} is for blocks and sub-blocks, not for a weight"
    inputs = shape.in_features
    if option.group is not None and inputs % option.group:
        fitting = ", ".join(_fitting_groups(option, inputs))
        return f"group {option.group} does not divide {inputs} inputs; nearest: {fitting}"
    if isinstance(option.sparsity, tuple) and (
        reason := _pattern_refusal(option, option.sparsity, shape)
    ):
        return reason
    if option.rank_percent is not None or option.residual_rank is not None:
        return _rank_refusal(option, shape, rank_multiple)
    return None


def _fitting_groups(option: Option, inputs: int) -> list[str]:
    """The option with the nearest smaller and larger group that divides `inputs`, at least 8."""
    groups = [group for group in range(8, inputs + 1) if inputs % group == 0]
    wanted = option.group or 0
    nearest = [group for group in groups if group < wanted][-1:]
    nearest += [group for group in groups if group > wanted][:1]
    if not nearest:
        return [str(replace(option, group=None, symmetric=option.bits in ALWAYS_SYMMETRIC))]
    return [str(replace(option, group=group)) for group in nearest]


def _pattern_refusal(option: Option, pattern: tuple[int, int], shape: LayerShape) -> str | None:
    """Why N:M cannot be had: M has to divide the inputs, and these have to be channels."""
    n, m = pattern
    percent = round(Decimal(100 * (m - n)) / m, 1)
    share = replace(option, sparsity=min(max(percent, Decimal("0.1")), Decimal("99.9")))
    if shape.conv is not None and shape.conv.kernel != (1, 1):
        rows, columns = shape.conv.kernel
        return f"{n}:{m} is realized for kernels of 1 x 1, not {rows} x {columns}; nearest: {share}"
    inputs = shape.in_features
    if inputs % m == 0:
        return None
    sizes = [size for size in range(2, inputs + 1) if inputs % size == 0]
    nearest = [size for size in sizes if size < m][-1:] + [size for size in sizes if size > m][:1]
    patterns = [(min(size - 1, max(1, round(Decimal(n * size) / m))), size) for size in nearest]
    fitting = [replace(option, sparsity=pattern) for pattern in patterns] or [share]
    told = ", ".join(map(str, fitting))
    return f"{n}:{m} needs a multiple of {m} inputs, not {inputs}; nearest: {told}"


def _rank_refusal(option: Option, shape: LayerShape, rank_multiple: int) -> str | None:
    out, inputs = shape.out_features, shape.in_features
    if shape.conv is not None:
        step = "rP%" if option.rank_percent is not None else "+rK"
        return f"{step} is not realized for convolutions; sP%, wN and both together are"
    if option.residual_rank is not None:
        if option.residual_rank < min(out, inputs):
            return None
        most = min(out, inputs) - 1
        told = f"; at most: {replace(option, residual_rank=most)}" if most else ""
        return f"a residual of rank {option.residual_rank} does not fit [{out}, {inputs}]{told}"
    rank = rank_of(option.rank_percent or Decimal(0), out, inputs, rank_multiple)
    if rank >= 1 and rank * (out + inputs) < out * inputs:
        return None
    least = Decimal(100 * rank_multiple * (out + inputs)) / (out * inputs)
    percent = least.quantize(Decimal("0.1"), ROUND_CEILING)
    told = f"; nearest: {replace(option, rank_percent=percent)}" if percent < 100 else ""
    return (
        f"{option} of [{out}, {inputs}] is no rank that is a multiple of {rank_multiple} and"
        f" saves parameters{told}"
    )


def format_of(
    option: Option, shape: LayerShape, model_dtype: str, rank_multiple: int = RANK_MULTIPLE
) -> Format:
    """How a layer of `shape` is stored under `option`.

    Args:
        option: An option that is not refused.
        shape: The layer.
        model_dtype: "float32", "bfloat16" or "float16"; what `dense` means.
        rank_multiple: Ranks of rP% are multiples of it.

    Raises:
        InvalidInput: The option is refused.
    """
    if reason := refusal(option, shape, rank_multiple):
        raise InvalidInput(f'option "{option}": {reason}')
    rank = None
    if option.rank_percent is not None:
        sizes = (shape.out_features, shape.in_features)
        rank = rank_of(option.rank_percent, *sizes, rank_multiple)
    return Format(
        dtype=NAMED_DTYPES.get(option.name or "", model_dtype),
        bits=option.bits,
        group=option.group,
        symmetric=option.symmetric,
        activation_bits=option.activation_bits,
        sparse=option.sparsity is not None,
        rank=rank,
        residual_rank=option.residual_rank,
    )


def realize(
    weight: Tensor,
    shape: LayerShape,
    option: Option,
    statistics: InputStatistics | None,
    model_dtype: str,
    rank_multiple: int = RANK_MULTIPLE,
) -> StoredWeight:
    """`option` done to one weight.

    Args:
        weight: float32 [out, in].
        shape: The layer.
        option: What to do.
        statistics: Of the layer's inputs; None: methods fall back as `effective_methods` says.
        model_dtype: dtype of what the option leaves as it is.
        rank_multiple: Ranks of rP% are multiples of it.

    Raises:
        InvalidInput: The option is refused, or weight or statistics are not finite.
    """
    format = format_of(option, shape, model_dtype, rank_multiple)
    _check(weight, shape, statistics)
    weight = weight.detach().float()
    methods = effective_methods(option, statistics is not None)
    moment = None if statistics is None else statistics.second_moment
    if format.rank is not None:
        whitening = moment if methods["r"] == "whitened" else None
        pair = low_rank(weight, format.rank, whitening)
        return StoredWeight(format, shape, _named(("left", "right"), pair, format.torch_dtype))
    left, kept = _sparsified(weight, option, methods, moment)
    plain = replace(format, residual_rank=None)
    stored = StoredWeight(plain, shape, _entries(left, plain, kept, moment, methods.get("w")))
    if format.residual_rank is None:
        return stored
    whitening = moment if methods["residual"] == "whitened" else None
    repair = residual_pair(weight, reference_weight(stored), format.residual_rank, whitening)
    names = ("residual_left", "residual_right")
    return StoredWeight(format, shape, stored.tensors | _named(names, repair, torch.bfloat16))


def _check(weight: Tensor, shape: LayerShape, statistics: InputStatistics | None) -> None:
    expected = (shape.out_features, shape.in_features)
    if tuple(weight.shape) != expected:
        raise InvalidInput(f"weight is {list(weight.shape)}, its layer {list(expected)}")
    if not weight.isfinite().all():
        raise InvalidInput("weight holds values that are not finite (NaN or infinite)")
    if statistics is None:
        return
    if tuple(statistics.second_moment.shape) != (expected[1], expected[1]):
        sizes = list(statistics.second_moment.shape)
        raise InvalidInput(f"statistics are {sizes}, the layer has {expected[1]} inputs")
    if not statistics.second_moment.isfinite().all():
        raise InvalidInput("calibration inputs hold values that are not finite (NaN or infinite)")


def _sparsified(
    weight: Tensor, option: Option, methods: Mapping[str, str], moment: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """What sP% or N:M leaves: the weights, and bool [out, in] which of them; None: all."""
    if option.sparsity is None:
        return weight, None
    if methods["s"] == "sparsegpt" and moment is not None:
        kept, corrected = sparsegpt(weight, option.sparsity, moment)
        return corrected, kept
    seen = moment if methods["s"] == "wanda" else None
    if isinstance(option.sparsity, tuple):
        return weight, keep_pattern(weight, option.sparsity, seen)
    if seen is None:
        return weight, keep_largest(weight, option.sparsity)
    return weight, keep_wanda(weight, option.sparsity, seen)


def _entries(
    weight: Tensor,
    format: Format,
    kept: Tensor | None,
    moment: Tensor | None,
    method: str | None,
) -> dict[str, Tensor]:
    """The tensors of everything but low rank and residual; `method` is that of the step w."""
    mask = {} if kept is None else {"mask": pack_mask(kept.flatten())}
    if format.bits is None:
        name = "weight" if kept is None else "values"
        values = weight if kept is None else weight[kept]
        return mask | {name: values.to(format.torch_dtype, copy=True).contiguous()}
    quantized = _quantized(weight, format, format.bits, kept, moment, method)
    codes = quantized.codes.flatten() if kept is None else quantized.codes[kept]
    zero = {} if quantized.zero is None else {"zero": quantized.zero}
    return mask | {"codes": pack_codes(codes, format.bits), "scale": quantized.scale} | zero


def _quantized(
    weight: Tensor,
    format: Format,
    bits: float,
    kept: Tensor | None,
    moment: Tensor | None,
    method: str | None,
) -> Quantized:
    if method == "hqq":
        return hqq(weight, bits, format.group, kept)
    if method == "gptq" and moment is not None:
        return gptq(weight, bits, format.group, format.symmetric, moment, kept)
    importance = None if moment is None else moment.diagonal()
    return quantize(weight, bits, format.group, format.symmetric, kept, importance)


def _named(
    names: tuple[str, str], pair: tuple[Tensor, Tensor], dtype: torch.dtype
) -> dict[str, Tensor]:
    return {name: factor.to(dtype).contiguous() for name, factor in zip(names, pair, strict=True)}
