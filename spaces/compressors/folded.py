"""AWQ's scales in the norm before the layers: what is stored of these knows nothing of them."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import Tensor

from apportion.kernels.formats import LayerShape, StoredWeight
from apportion.kernels.reference import reference_weight
from apportion.spaces.compressors.awq import ALPHAS, magnitudes, output_error, rates
from apportion.spaces.compressors.compose import (
    RANK_MULTIPLE,
    InputStatistics,
    check_layer,
    effective_methods,
    finite,
    format_of,
    repaired,
    sparsified,
)
from apportion.spaces.compressors.encode import encode
from apportion.spaces.grammar import Option

Fold = Callable[[Tensor], tuple[tuple[Tensor, ...], Tensor]]
"""From what the inputs should be multiplied by, float64 [in], the norm's new vectors and what they
are multiplied by then, float32 [in] (`spaces.folding.fold`)."""


def realize_folded(
    weights: Sequence[Tensor],
    shapes: Sequence[LayerShape],
    option: Option,
    statistics: InputStatistics | None,
    fold: Fold,
    model_dtype: str,
    rank_multiple: int = RANK_MULTIPLE,
) -> tuple[tuple[StoredWeight, ...], tuple[Tensor, ...]]:
    """An option with `w...:awq` done to layers whose scales go into the norm that they alone read.

    The layers share the scales: of all powers the one of least output error of all of them, on what
    the rounded norm gives. The rest of the option is done to the weights that undo the norm's
    change, on its inputs, but what `s` removes is chosen before. Of all powers 0 is `rtn`.

    Args:
        weights: float32 [out, in] of each layer.
        shapes: the layers.
        option: what to do; not refused.
        statistics: of what the dense norm gives.
        fold: puts scales into the norm.
        model_dtype: dtype of what the option leaves as it is.
        rank_multiple: ranks of rP% are multiples of it.

    Returns:
        What is stored of each layer, and the norm's vectors.

    Raises:
        InvalidInput: there are no statistics, or weights, statistics or what would be stored are
            not finite.
    """
    methods = effective_methods(option, statistics is not None)
    pairs = list(zip(weights, shapes, strict=True))
    for weight, shape in pairs:
        check_layer(weight, shape, statistics)
    moment = _moment(statistics)
    left = [sparsified(weight, option, methods, moment) for weight in weights]
    plain = [
        replace(
            format_of(option, shape, model_dtype, rank_multiple),
            input_scaled=False,
            residual_rank=None,
        )
        for shape in shapes
    ]
    magnitude = magnitudes(moment.diagonal())

    def tried(alpha: float) -> tuple[float, list[StoredWeight], tuple[Tensor, ...], Tensor]:
        vectors, rate = fold(rates(magnitude, alpha))
        met, error, made = _scaled(moment, rate), 0.0, []
        for (weight, kept), format, shape in zip(left, plain, shapes, strict=True):
            tensors = encode(weight / rate, format, kept, met, "rtn")
            stored = finite(StoredWeight(format, shape, tensors), option)
            error += output_error(weight, reference_weight(stored) * rate, moment)
            made.append(stored)
        return error, made, vectors, rate

    _, made, vectors, rate = min(map(tried, ALPHAS), key=lambda each: each[0])
    met = _scaled(moment, rate)
    repairs = (
        repaired(weight / rate, stored, option, methods, met)
        for weight, stored in zip(weights, made, strict=True)
    )
    return tuple(repairs), vectors


def _moment(statistics: InputStatistics | None) -> Tensor:
    """The second moment; `effective_methods` has refused awq where nothing is known."""
    if statistics is None:
        raise ValueError("awq needs statistics")
    return statistics.second_moment


def _scaled(moment: Tensor, rate: Tensor) -> Tensor:
    """The second moment [in, in] of inputs that are multiplied by `rate` [in]."""
    return moment * rate.double() * rate.double()[:, None]
