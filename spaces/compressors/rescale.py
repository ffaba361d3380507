"""Scales and zeros fitted again to codes that are final, for the least error of the outputs."""

import torch
from torch import Tensor

from apportion.kernels.codes import middle
from apportion.spaces.compressors.compensate import DAMPING, PARTS
from apportion.spaces.compressors.quantize import Quantized

DEPENDENT = 1e-6  # share of a group's squared codes below which they count as all alike


def rescale(
    weight: Tensor,
    quantized: Quantized,
    bits: float,
    second_moment: Tensor,
    kept: Tensor | None = None,
) -> Quantized:
    """The same codes with scales and zeros of less output error tr(E M E^T), E what is lost.

    One pass over the groups in their order. Each takes the least-squares scale and zero given those
    of all other groups, the scale rounded to bfloat16 first and the zero fitted to that, in the
    rows where this lowers the error. M is damped as in `regression`, and computed with in float32:
    what is fitted is rounded to 8 bits. Without any live input nothing changes.

    Args:
        weight: float32 [out, in], what should have been stored.
        quantized: What is stored.
        bits: Bits per code.
        second_moment: float64 [in, in], finite, the sum of x x^T.
        kept: bool [out, in]; weights that are False are stored as zero.
    """
    diagonal = second_moment.diagonal()
    unit = diagonal[diagonal > 0].mean()
    if not unit > 0:
        return quantized
    ones = torch.ones_like(weight) if kept is None else kept.float()
    codes = quantized.codes.float().sub_(middle(bits)).mul_(ones)
    ones = torch.zeros_like(weight) if quantized.zero is None else ones
    scale = quantized.scale.float()
    zero = torch.zeros_like(scale) if quantized.zero is None else quantized.zero.float()
    groups, size = scale.shape[1], weight.shape[1] // scale.shape[1]
    lost = scale.repeat_interleave(size, 1).mul_(codes)
    torch.sub(weight, lost, out=lost)
    lost -= zero.repeat_interleave(size, 1).mul_(ones)
    for g in range(groups):
        part = slice(g * size, (g + 1) * size)
        c, one = codes[:, part], ones[:, part]
        moment = _multiple(second_moment[:, part], unit)
        moment[part].diagonal().add_(DAMPING)
        more, up = _step(lost @ moment, c, one, moment[part], scale[:, g], zero[:, g])
        lost[:, part] -= (c * more[:, None]).add_(one * up[:, None])
        scale[:, g] += more
        zero[:, g] += up
    return Quantized(
        quantized.codes, scale.bfloat16(), None if quantized.zero is None else zero.bfloat16()
    )


def _multiple(moment: Tensor, unit: Tensor) -> Tensor:
    """float32 [in, size]: columns of the moment in units, without another float64 copy of them."""
    multiple = torch.empty(moment.shape)
    for rows, of in zip(multiple.chunk(PARTS), moment.chunk(PARTS), strict=True):
        rows.copy_(of / unit)
    return multiple


def _step(
    pull: Tensor, codes: Tensor, ones: Tensor, moment: Tensor, scale: Tensor, zero: Tensor
) -> tuple[Tensor, Tensor]:
    """Changes of scale and zero [out], to bfloat16 values; none where they would not help.

    Args:
        pull: [out, size], the outputs' loss times the group's inputs; overwritten.
        codes: [out, size], what the scale multiplies.
        ones: [out, size], what the zero multiplies; all 0 where there is no zero.
        moment: [size, size], of the group's inputs.
        scale: [out]
        zero: [out]
    """
    toward = codes @ moment
    cc, cross = (toward * codes).sum(1), toward.mul_(ones).sum(1)
    oo = torch.mm(ones, moment, out=toward).mul_(ones).sum(1)
    pull_c, pull_o = (pull * codes).sum(1), pull.mul_(ones).sum(1)
    per_one = torch.where(oo > 0, 1 / oo, 0)
    spread = cc - cross.square() * per_one
    best = (pull_c - pull_o * cross * per_one) / spread
    more = _to_bfloat16(scale, torch.where(spread > DEPENDENT * cc, best, 0))
    up = _to_bfloat16(zero, (pull_o - more * cross) * per_one)
    change = more * (more * cc + 2 * up * cross - 2 * pull_c) + up * (up * oo - 2 * pull_o)
    return torch.where(change < 0, more, 0), torch.where(change < 0, up, 0)


def _to_bfloat16(start: Tensor, change: Tensor) -> Tensor:
    """The change nearest to `change` that ends on a bfloat16 value."""
    return (start + change).bfloat16().float() - start
