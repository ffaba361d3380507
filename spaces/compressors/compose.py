"""An option applied to one weight: which methods, in which order, stored how, or refused why."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from apportion.errors import InvalidInput
from apportion.kernels.formats import Format, LayerShape, StoredWeight
from apportion.kernels.reference import reference_weight
from apportion.spaces.compressors.activation_range import scale_of
from apportion.spaces.compressors.compensate import regression
from apportion.spaces.compressors.encode import encode
from apportion.spaces.compressors.factorize import forget_root, low_rank
from apportion.spaces.compressors.ranks import positions_of, ranks_of
from apportion.spaces.compressors.refusals import (
    group_refusal,
    method_refusal,
    outlier_refusal,
    pattern_refusal,
    range_refusal,
    rank_refusal,
    residual_refusal,
    scaling_refusal,
)
from apportion.spaces.compressors.residual import residual_pair
from apportion.spaces.compressors.sparsegpt import sparsegpt
from apportion.spaces.compressors.sparsify import (
    keep_largest,
    keep_pattern,
    keep_wanda,
    removed_count,
)
from apportion.spaces.compressors.tucker import tucker2
from apportion.spaces.grammar import WITHOUT_STATISTICS, Option
from apportion.spaces.unrealized import unrealized

NAMED_DTYPES: Mapping[str, str] = {"f32": "float32", "bf16": "bfloat16", "fp16": "float16"}
DEFAULTS = {"c": "obs", "v": "whitened", "s": "wanda", "r": "whitened", "w": "rtn"}
DEFAULTS |= {"q": "whitened", "residual": "whitened"}
FALLBACKS = {"c": "magnitude", "v": "svd", "s": "magnitude", "r": "svd", "w": "rtn"}
FALLBACKS |= {"q": "svd", "residual": "svd"}
RANK_MULTIPLE = 8


@dataclass
class InputStatistics:
    """What calibration saw enter a layer.

    Args:
        second_moment: float64 [in, in], the sum of x x^T over tokens.
        tokens: How many tokens were summed.
        peak: float32 [in], the largest |x| of each input over tokens, 0 where there were none;
            None: not known.
    """

    second_moment: Tensor
    tokens: int
    peak: Tensor | None = None


def effective_methods(option: Option, has_statistics: bool) -> dict[str, str]:
    """The method of every step that has methods: the one asked for, else the default.

    Defaults: c obs, s wanda, v, q, r and residual whitened, w rtn. Where a layer has no statistics
    (an unfolded convolution may have none) they are c and s magnitude, v, q, r and residual svd,
    w rtn.

    Raises:
        InvalidInput: A method, or a8s, that needs statistics was asked for and there are none.
    """
    asked = dict(option.methods)
    if option.static_activations and not has_statistics:
        raise InvalidInput(
            f'option "{option}": a8s needs the range of the inputs and this layer has no'
            f" statistics; ask for {replace(option, static_activations=False)}"
        )
    for step, method in asked.items():
        if not has_statistics and method not in (*WITHOUT_STATISTICS, "rtn"):
            raise InvalidInput(
                f'option "{option}": {method} needs calibration statistics and this layer has none;'
                f" ask for {FALLBACKS[step]}, or for no method"
            )
    defaults = DEFAULTS if has_statistics else FALLBACKS
    return {step: asked.get(step, defaults[step]) for step in option.steps if step in defaults}


def refusal(option: Option, shape: LayerShape, rank_multiple: int = RANK_MULTIPLE) -> str | None:
    """Why `option` cannot be had for a layer of `shape`, with what fits; None if it can."""
    if reason := unrealized(option):
        return reason
    if option.is_structure:
        return f"{option} is for blocks and sub-blocks, not for a weight"
    return (
        group_refusal(option, shape)
        or pattern_refusal(option, shape)
        or outlier_refusal(option, shape)
        or rank_refusal(option, shape, rank_multiple)
        or residual_refusal(option, shape)
        or method_refusal(option, shape)
        or scaling_refusal(option, shape)
        or range_refusal(option, shape)
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
    rank, input_rank = None, None
    if option.rank_percent is not None:
        rank, input_rank = ranks_of(option.rank_percent, shape, rank_multiple)
    outliers = None
    if option.outlier_percent is not None:
        outliers = removed_count(option.outlier_percent, shape.weights)
    return Format(
        dtype=NAMED_DTYPES.get(option.name or "", model_dtype),
        bits=option.bits,
        group=option.group,
        symmetric=option.symmetric,
        activation_bits=option.activation_bits,
        sparse=option.sparsity is not None,
        rank=rank,
        input_rank=input_rank,
        residual_rank=option.residual_rank,
        outliers=outliers,
        input_scaled=option.scales_inputs,
        static_activations=option.static_activations,
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
        InvalidInput: The option is refused, or weight, statistics or what would be stored are not
            finite.
    """
    format = format_of(option, shape, model_dtype, rank_multiple)
    check_layer(weight, shape, statistics)
    weight = weight.detach().float()
    methods = effective_methods(option, statistics is not None)
    moment = None if statistics is None else statistics.second_moment
    if format.rank is not None:
        whitening = moment if methods["r"] == "whitened" else None
        tensors = _factors(weight, shape, format, format.rank, whitening)
        return finite(StoredWeight(format, shape, tensors), option)
    left, kept = sparsified(weight, option, methods, moment)
    plain = replace(format, residual_rank=None)
    tensors = encode(left, plain, kept, moment, methods.get("w"))
    if option.static_activations:
        tensors["activation_scale"] = scale_of(None if statistics is None else statistics.peak)
    stored = finite(StoredWeight(plain, shape, tensors), option)
    return repaired(weight, stored, option, methods, moment)


def repaired(
    weight: Tensor,
    stored: StoredWeight,
    option: Option,
    methods: Mapping[str, str],
    moment: Tensor | None,
) -> StoredWeight:
    """What is stored, with the option's residual, if it has one, of what it lost of `weight`."""
    if option.residual_rank is None:
        return stored
    whitening = moment if methods["residual"] == "whitened" else None
    repair = residual_pair(weight, reference_weight(stored), option.residual_rank, whitening)
    names = ("residual_left", "residual_right")
    tensors = stored.tensors | _named(names, repair, torch.bfloat16)
    format = replace(stored.format, residual_rank=option.residual_rank)
    return finite(StoredWeight(format, stored.shape, tensors), option)


def forget_factorizations() -> None:
    """Give up what is kept for further options of the last layer: as large as its statistics."""
    regression.forget()
    forget_root()


def check_layer(weight: Tensor, shape: LayerShape, statistics: InputStatistics | None) -> None:
    """Raise InvalidInput unless a weight and its inputs' statistics are finite and fit."""
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
    peak = statistics.peak
    finite = statistics.second_moment.isfinite().all() and (peak is None or peak.isfinite().all())
    if not finite:
        raise InvalidInput("calibration inputs hold values that are not finite (NaN or infinite)")


def finite(stored: StoredWeight, option: Option) -> StoredWeight:
    """What is stored. Raises InvalidInput where it holds NaN or infinite values."""
    for name, tensor in stored.tensors.items():
        if not tensor.isfinite().all():
            raise InvalidInput(
                f'option "{option}": {name} would hold values beyond the range of '
                f"{str(tensor.dtype).removeprefix('torch.')}: the weights are too large for it"
            )
    return stored


def sparsified(
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


def _factors(
    weight: Tensor, shape: LayerShape, format: Format, rank: int, moment: Tensor | None
) -> dict[str, Tensor]:
    """The tensors of a low-rank pair, or of Tucker's form."""
    if format.input_rank is None:
        pair = low_rank(weight, rank, moment)
        return _named(("left", "right"), pair, format.torch_dtype)
    channels = weight.reshape(len(weight), -1, positions_of(shape))
    factors = tucker2(channels, rank, format.input_rank, moment)
    return _named(("left", "core", "right"), factors, format.torch_dtype)


def _named(
    names: tuple[str, ...], factors: tuple[Tensor, ...], dtype: torch.dtype
) -> dict[str, Tensor]:
    pairs = zip(names, factors, strict=True)
    return {name: factor.to(dtype).contiguous() for name, factor in pairs}
