"""Half-Quadratic Quantization: rounding without data, with zeros that leave few large errors.

Badri and Shaji, 2023 ("Half-Quadratic Quantization of large machine learning models"). Each
group's scale is that of its whole range; its zero z minimizes the sum of |w - w_q|^p, p < 1, which
lets a few outliers be wrong so that the many are right. With errors e split off, the iteration is

    e <- shrink(w - w_q),  shrink(x) = sign(x) * max(0, |x| - |x|^(p - 1) / beta)
    z <- mean of w - e - (q - 2^(N-1)) * scale,  beta <- kappa * beta

with p = 0.7, beta = 10 at first, kappa = 1.01 and 20 steps, as the authors publish it. They stop
where the whole matrix's error rises; here each group takes the zero of least error that it met.
Their beta is for weights as they are: errors below 0.17 all shrink to 0, and z is then the mean.
"""

import torch
from torch import Tensor

from apportion.kernels.codes import levels, middle
from apportion.spaces.compressors.quantize import BLOCK_WEIGHTS, Quantized, kept_range

NORM = 0.7
BETA, KAPPA = 10.0, 1.01
STEPS = 20


def hqq(
    weight: Tensor, bits: float, group: int | None = None, kept: Tensor | None = None
) -> Quantized:
    """Codes, scales and zeros; a group's error is never more than that of plain rounding.

    The error of a zero is the sum of |w - w_q|^0.7 with scale and zero as they are stored, in
    bfloat16; plain rounding takes the scale and the zero of the group's whole range. Computed in
    float64.

    Args:
        weight: [out, in], finite.
        bits: Bits per code, whole, 2 to 7.
        group: Inputs that share a scale; must divide `in`. None: all inputs of a row.
        kept: bool [out, in]; weights that are False are not stored and have no say.
    """
    out, inputs = weight.shape
    size = group or inputs
    says = torch.ones_like(weight, dtype=torch.bool) if kept is None else kept
    rows = max(1, BLOCK_WEIGHTS // 2 // size)  # of float64, twice as long
    pairs = zip(
        torch.split(weight.reshape(-1, size), rows),
        torch.split(says.reshape(-1, size), rows),
        strict=True,
    )
    blocks = [_fit(x.double(), here, bits) for x, here in pairs]
    codes, scale, zero = (torch.cat(parts) for parts in zip(*blocks, strict=True))
    return Quantized(
        codes.reshape(out, inputs),
        scale.reshape(out, -1).bfloat16(),
        zero.reshape(out, -1).bfloat16(),
    )


def _fit(x: Tensor, kept: Tensor, bits: float) -> tuple[Tensor, Tensor, Tensor]:
    """Codes uint8, scale and zero float64 [rows, 1] of values x, float64 [rows, size]."""
    low, high = (end[:, None] for end in kept_range(x, kept))
    scale = _bfloat16((high - low) / (levels(bits) - 1))
    count = kept.sum(1, keepdim=True).clamp_min(1)

    def rounded(zero: Tensor) -> Tensor:
        codes = ((x - zero) / torch.where(scale == 0, 1, scale)).round()
        return codes.clamp_(-middle(bits), levels(bits) - 1 - middle(bits))

    def error(zero: Tensor) -> Tensor:
        lost = x - rounded(zero) * scale - zero
        return (lost.abs_().pow_(NORM) * kept).sum(1, keepdim=True)

    zero = low + middle(bits) * scale
    best = _bfloat16(zero)
    least = error(best)
    beta = BETA
    for _ in range(STEPS):
        shifts = x - rounded(zero) * scale
        zero = ((shifts - _shrink(shifts - zero, beta)) * kept).sum(1, keepdim=True) / count
        beta *= KAPPA
        stored = _bfloat16(zero)
        found = error(stored)
        best, least = torch.where(found < least, stored, best), torch.minimum(found, least)
    return (rounded(best) + middle(bits)).to(torch.uint8), scale, best


def _shrink(x: Tensor, beta: float) -> Tensor:
    """The proximal step of the |x|^p norm, element by element."""
    return x.sign() * (x.abs() - x.abs().pow(NORM - 1) / beta).clamp_min_(0)


def _bfloat16(values: Tensor) -> Tensor:
    return values.bfloat16().double()
