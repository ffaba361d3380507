"""Scales for inputs, so that weights of active ones are rounded more finely: AWQ.

Lin and others, 2023 ("AWQ: Activation-aware Weight Quantization for LLM Compression and
Acceleration", section 3.2). W diag(s) is rounded in place of W, and the inputs are divided by s:

    s = a^alpha / sqrt(max(a^alpha) * min(a^alpha)), a the magnitudes of the inputs,

of alpha = 0, 0.05, ..., 0.95 the one of least output error. As published, but for this:
- a is the root mean square of an input, not its mean absolute value: calibration keeps second
  moments alone. The error is exact all the same: tr(E M E^T), E what is lost, M the moment.
- The scales are this layer's own, stored and multiplied by at run time. The authors fold them into
  what makes the input, so layers that read one input share them, and of these they take the error
  of the whole attention or MLP. Where they can go into a norm, `folded` does so too, by the error
  of the layers.
- Every alpha is tried with the rounding of `quantize`, clipping search included. The authors try
  minimum-maximum ranges, and clip when alpha is chosen.
- They raise a^alpha to 1e-4 at least. Here an input that calibration never saw counts as an average
  one, and a^2 is raised to 1e-3 of its mean, as in `quantize`: what 1 / s makes of the rounding
  error of a quiet input stays sane where the input is louder than it was.
"""

from dataclasses import replace

import torch
from torch import Tensor

from apportion.spaces.compressors.quantize import Quantized, quantize, relative_importance

ALPHAS = tuple(step / 20 for step in range(20))
ROWS = 256  # of what is lost, in float64 at a time


def awq(
    weight: Tensor,
    bits: float,
    group: int | None,
    symmetric: bool,
    second_moment: Tensor,
    kept: Tensor | None = None,
) -> Quantized:
    """Codes, scales, zeros and scales of the inputs; never a larger error than by `quantize`.

    What is stored of s is 1 / s, rounded to bfloat16, and all else is fitted to what is stored:
    `quantize` rounds w_j s_j and weighs it by the mean square of what it meets, x_j / s_j.

    Args:
        weight: float32 [out, in], finite.
        bits: Bits per code, one of `CODE_BITS`.
        group: Inputs that share a scale; must divide `in`. None: all inputs of a row.
        symmetric: No zeros, as in `quantize`.
        second_moment: float64 [in, in], finite, the sum of x x^T. Without a live input alpha is 0.
        kept: bool [out, in]; weights that are False count as zero and their codes mean nothing.
    """
    mean_square = second_moment.diagonal()
    magnitude = magnitudes(mean_square)

    def tried(alpha: float) -> Quantized:
        input_scale = rates(magnitude, alpha).bfloat16()
        rate = input_scale.float()
        met = mean_square * rate.double().square()
        found = quantize(weight / rate, bits, group, symmetric, kept, met)
        return replace(found, input_scale=input_scale)

    def error(found: Quantized) -> float:
        values = found.values(bits)
        return output_error(weight, values if kept is None else values * kept, second_moment)

    return min(map(tried, ALPHAS), key=error)


def magnitudes(mean_square: Tensor) -> Tensor:
    """float64 [in] around 1: root mean squares, those of dead inputs the mean of the live ones."""
    live = mean_square > 0
    known = mean_square.where(live, mean_square[live].mean())
    return relative_importance(known, len(known)).double().sqrt()


def rates(magnitude: Tensor, alpha: float) -> Tensor:
    """float64 [in], 1 / s: what inputs of these magnitudes are multiplied by."""
    s = magnitude**alpha
    return (s.max() * s.min()).sqrt() / s


def output_error(weight: Tensor, stored: Tensor, second_moment: Tensor) -> float:
    """tr(E M E^T) in float64, E = weight - stored [out, in]."""
    pairs = zip(torch.split(weight, ROWS), torch.split(stored, ROWS), strict=True)
    lost = (rows.double() - of.double() for rows, of in pairs)
    return sum(float(((part @ second_moment) * part).sum()) for part in lost)
