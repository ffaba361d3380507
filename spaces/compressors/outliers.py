"""Which weights are worth more than rounding: an exact number of them, kept as they are.

SpQR (Dettmers and others, 2023, section 4): few weights make most of what rounding loses, by their
own errors and by the range that they force on their group. Kept apart, they have no say in scales.
"""

import torch
from torch import Tensor

from apportion.spaces.compressors.quantize import quantize, relative_importance


def largest(cost: Tensor, count: int, kept: Tensor | None = None) -> Tensor:
    """bool [out, in], True for the `count` entries of the largest cost; of equal ones, the first.

    Args:
        cost: [out, in], not negative.
        count: At most as many as are kept.
        kept: bool [out, in]; those that are False are not chosen. None: all may be.
    """
    cost = cost if kept is None else cost.masked_fill(~kept, -1)
    order = cost.flatten().argsort(descending=True, stable=True)
    chosen = torch.zeros(cost.numel(), dtype=torch.bool)
    chosen[order[:count]] = True
    return chosen.view_as(cost)


def sensitive(
    weight: Tensor,
    count: int,
    bits: float,
    group: int | None,
    symmetric: bool,
    importance: Tensor,
    kept: Tensor | None = None,
) -> Tensor:
    """bool [out, in], True for the weights whose rounding costs most of the outputs' error.

    What a weight costs is its squared rounding error times its input's mean square (SpQR's
    sensitivity), on the scales that `quantize` fits without the largest |w|: with them, the range
    is so wide that they cost nothing, and all others much.

    Why so: squared output errors of `quantize` with what else was tried left out, on layers of the
    shipped model, Gaussian and Student-t weights, at 2 to 4 bits and 1 %. The largest |w|: 1 to
    12 % more; from scales fitted with all weights: 2 % less to 58 % more; once more from the
    scales without what was found: 2 % less to as much.

    Args:
        weight: float32 [out, in], finite.
        count: How many; at most as many as are kept.
        bits: Bits per code, one of `CODE_BITS`.
        group: Inputs that share a scale; must divide `in`. None: all inputs of a row.
        symmetric: No zeros, as in `quantize`.
        importance: [in], the mean square of each input; counts as in `quantize`.
        kept: bool [out, in]; weights that are False are not stored and are none of them.
    """
    far = largest(weight.abs(), count, kept)
    rest = ~far if kept is None else kept & ~far
    fitted = quantize(weight, bits, group, symmetric, rest, importance)
    cost = (weight - fitted.values(bits)).double().square_()
    cost *= relative_importance(importance, weight.shape[1]).double()
    return largest(cost, count, kept)
