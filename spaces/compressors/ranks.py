"""The ranks that P % of a layer's parameters give, rounded down to a multiple.

Of a matrix [out, in] one rank k, with k (out + in) parameters. Of a convolution with a kernel of
more than one position, Tucker-2: ranks for its output and its input channels, t of both.
"""

import math
from bisect import bisect_right
from decimal import Decimal
from fractions import Fraction

from apportion.kernels.formats import LayerShape
from apportion.spaces.compressors.factorize import rank_of


def positions_of(shape: LayerShape) -> int:
    """Positions of a convolution's kernel; 1 for a linear layer."""
    return 1 if shape.conv is None else math.prod(shape.conv.kernel)


def ranks_of(percent: Decimal, shape: LayerShape, rank_multiple: int) -> tuple[int, int | None]:
    """(rank, rank of the input channels or None where one rank does), all 0 if none is so small.

    A Tucker rank above what the other one and the positions span gains nothing: it is cut to that.
    """
    out, inputs, positions = shape.out_features, shape.in_features, positions_of(shape)
    if positions == 1:
        return rank_of(percent, out, inputs, rank_multiple), None
    channels, most = inputs // positions, Fraction(percent) * shape.weights / 100

    def largest(of: int) -> int:
        ranks = range(rank_multiple, of + 1, rank_multiple)
        fitting = bisect_right(ranks, most, key=lambda r: _parameters(shape, Fraction(r, of)))
        return fitting * rank_multiple

    rank, input_rank = largest(out), largest(channels)
    if not rank or not input_rank:
        return 0, 0
    # Both are multiples, and so are these products.
    rank = min(rank, positions * input_rank)
    return rank, min(input_rank, positions * rank)


def least_percent(shape: LayerShape, rank_multiple: int) -> Decimal:
    """The least percentage of the parameters that gives ranks, not rounded."""
    out, inputs, positions = shape.out_features, shape.in_features, positions_of(shape)
    if positions == 1:
        return Decimal(100 * rank_multiple * (out + inputs)) / (out * inputs)
    share = Fraction(rank_multiple, min(out, inputs // positions))
    percent = 100 * _parameters(shape, share) / shape.weights
    return Decimal(percent.numerator) / percent.denominator


def _parameters(shape: LayerShape, share: Fraction) -> Fraction:
    """Of Tucker's form with that share t of all channels: t^2 of the kernel, t of two squares."""
    out, channels = shape.out_features, shape.in_features // positions_of(shape)
    return share**2 * shape.weights + share * (out**2 + channels**2)
