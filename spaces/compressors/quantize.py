"""Rounding weights to N-bit codes with a bfloat16 scale, and below 8 bits a zero, per group.

A code q stands for w = (q - 2^(N-1)) * scale + zero. Scale and zero are rounded to bfloat16 first
and the codes fitted to the rounded values, so what is stored is what was optimized: the squared
error, each input weighted by its mean square. Per group, a grid of clipped ranges is tried
(clipping search, as in OmniQuant and AWQ), the best few are refined by alternating least squares
(scale and zero given the codes, codes given scale and zero), and the least error ever seen wins;
the plain minimum-maximum range is on the grid, so the result is never worse than it.

Ternary codes (bits 1.58) stand for w = (q - 1) * scale; their scale is the exact optimum (Ternary
Weight Networks, Li and others, 2016, section 3.2, with weighted errors), rounded to bfloat16.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from apportion.kernels.codes import TERNARY_BITS, middle

SHRINKS = tuple(1 - 0.12 * step for step in range(6))
STARTS = 3
REFITS = 8
IMPORTANCE_FLOOR = 1e-3
BLOCK_WEIGHTS = 1 << 16  # working tensors of one block stay in a core's cache


@dataclass(frozen=True)
class Quantized:
    """Codes uint8 [out, in], scale and zero bfloat16 [out, groups]; no zero when symmetric.

    `input_scale` bfloat16 [in]: what the inputs, and so the values of codes, are multiplied by.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    input_scale: Tensor | None = None

    def values(self, bits: float) -> Tensor:
        """What the codes stand for, float32 [out, in]."""
        size = self.codes.shape[1] // self.scale.shape[1]
        values = self.codes.float() - middle(bits)
        values *= self.scale.float().repeat_interleave(size, 1)
        if self.zero is not None:
            values += self.zero.float().repeat_interleave(size, 1)
        return values if self.input_scale is None else values.mul_(self.input_scale.float())


@dataclass(frozen=True)
class _Grid:
    """The integers that codes less 2^(bits - 1) may take."""

    bits: float
    symmetric: bool

    @property
    def top(self) -> int:
        return int(2 ** (self.bits - 1))

    @property
    def low(self) -> int:
        return -127 if self.bits == 8 and self.symmetric else -self.top


def quantize(
    weight: Tensor,
    bits: float,
    group: int | None = None,
    symmetric: bool = False,
    kept: Tensor | None = None,
    importance: Tensor | None = None,
) -> Quantized:
    """Codes, scales and zeros of the least weighted squared error that the search finds.

    Args:
        weight: float32 [out, in], finite.
        bits: Bits per code, 2 to 8, or 1.58: ternary, whose zeros are 0.
        group: Inputs that share a scale; must divide `in`. None: all inputs of a row.
        symmetric: No zeros. Below 8 bits a scale may be negative, so that the one code more
            lies on the side of the larger weights; at 8 bits the code -128 is not used.
        kept: bool [out, in]; weights that are False are not stored and have no say.
        importance: [in], the mean square of each input; None: all alike.
    """
    out, inputs = weight.shape
    size = group or inputs
    per_input = relative_importance(importance, inputs).expand(out, inputs)
    if kept is not None:
        per_input = per_input * kept
    values, says = weight.reshape(-1, size), per_input.reshape(-1, size)
    grid = _Grid(bits, symmetric)
    rows = max(1, BLOCK_WEIGHTS // size)
    blocks = [
        _fit_ternary(x, h) if bits == TERNARY_BITS else _fit(x, h, grid)
        for x, h in zip(torch.split(values, rows), torch.split(says, rows), strict=True)
    ]
    codes, scale, zero = (torch.cat(parts) for parts in zip(*blocks, strict=True))
    return Quantized(
        codes.reshape(out, inputs),
        scale.reshape(out, -1).bfloat16(),
        None if symmetric else zero.reshape(out, -1).bfloat16(),
    )


def relative_importance(importance: Tensor | None, inputs: int) -> Tensor:
    """float32 [in] around 1; inputs never seen keep a little say, so that they round sanely."""
    if importance is None or not importance.mean() > 0:
        return torch.ones(inputs)
    return (importance / importance.mean()).clamp_min(IMPORTANCE_FLOOR).float()


def _fit(x: Tensor, h: Tensor, grid: _Grid) -> tuple[Tensor, Tensor, Tensor]:
    """Codes uint8 [rows, size], scale and zero float32 [rows] of values x with importance h."""
    scales, zeros = _starts(x, h, grid)
    errors = torch.stack([_round(x, h, s, z, grid)[1] for s, z in zip(scales, zeros, strict=True)])
    order = errors.argsort(dim=0, stable=True)
    error, scale, zero = (t.gather(0, order[:1])[0] for t in (errors, scales, zeros))
    hx = h * x
    for start in order[:STARTS]:
        s, z = (t.gather(0, start[None])[0] for t in (scales, zeros))
        codes, _ = _round(x, h, s, z, grid)
        for _ in range(REFITS):
            s, z = _refit(codes, h, hx, s, z, grid)
            codes, e = _round(x, h, s, z, grid)
            better = e < error
            error = torch.where(better, e, error)
            scale, zero = torch.where(better, s, scale), torch.where(better, z, zero)
    divisor = torch.where(scale == 0, 1, scale)[:, None]
    codes = ((x - zero[:, None]) / divisor).round().clamp_(grid.low, grid.top - 1)
    return (codes + grid.top).to(torch.uint8), scale, zero


def _fit_ternary(x: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `_fit`, codes 0, 1 and 2, zeros 0.

    Whatever the scale s, the weights with |w| > s / 2 are best rounded to +-s, so that the best
    nonzeros are the k largest |w| for some k; of those, the best s is their weighted mean of |w|,
    and lessens the error by (sum of h |w|)^2 / (sum of h). Every k is tried.
    """
    sizes, order = x.abs().double().sort(dim=1, descending=True, stable=True)
    says = h.gather(1, order).double()
    mass, moment = says.cumsum(1), (says * sizes).cumsum(1)
    mass = mass.clamp_min(torch.finfo(torch.float64).tiny)
    best = (moment.square() / mass).argmax(1, keepdim=True)
    scale = _bfloat16((moment / mass).gather(1, best)[:, 0].float())
    codes = torch.where(x.abs() > scale[:, None] / 2, x.sign(), 0)
    return (codes + 1).to(torch.uint8), scale, torch.zeros_like(scale)


def kept_range(x: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Least and largest kept value of each row of x [rows, size], both [rows]; 0 if none is."""
    some = kept.any(1)
    low = torch.where(some, x.where(kept, torch.inf).amin(1), 0)
    return low, torch.where(some, x.where(kept, -torch.inf).amax(1), 0)


def _starts(x: Tensor, h: Tensor, grid: _Grid) -> tuple[Tensor, Tensor]:
    """Scales and zeros [starts, rows] of clipped ranges; the first is the whole range."""
    low, high = kept_range(x, h > 0)
    if grid.symmetric:
        shrink = torch.tensor(SHRINKS)[:, None]
        largest = torch.where(high >= -low, high, low)
        scales = shrink * (largest.abs() if grid.low > -grid.top else -largest) / -grid.low
        if grid.low == -grid.top:
            scales = torch.cat([scales, -scales * grid.top / (grid.top - 1)])
        scales = _bfloat16(scales)
        return scales, torch.zeros_like(scales)
    pairs = torch.cartesian_prod(torch.tensor(SHRINKS), torch.tensor(SHRINKS))
    middle = (low + high) / 2
    bottom = middle - pairs[:, :1] * (middle - low)
    peak = middle + pairs[:, 1:] * (high - middle)
    scales = _bfloat16((peak - bottom) / (2 * grid.top - 1))
    return scales, _bfloat16(bottom + grid.top * scales)


def _round(x: Tensor, h: Tensor, s: Tensor, z: Tensor, grid: _Grid) -> tuple[Tensor, Tensor]:
    """Codes less 2^(bits - 1) [rows, size], and the weighted squared error [rows]."""
    inverse = torch.where(s == 0, 0, 1 / s)
    exact = torch.addcmul((-z * inverse)[:, None], x, inverse[:, None])
    codes = exact.round().clamp_(grid.low, grid.top - 1)
    return codes, exact.sub_(codes).square_().mul_(h).sum(1) * s.square()


def _refit(
    codes: Tensor, h: Tensor, hx: Tensor, s: Tensor, z: Tensor, grid: _Grid
) -> tuple[Tensor, Tensor]:
    """The weighted least-squares scale and zero of given codes, rounded; as before if undefined."""
    hc = h * codes
    cc, cx = (hc * codes).sum(1), (codes * hx).sum(1)
    if grid.symmetric:
        return _bfloat16(torch.where(cc > 0, cx / cc, s)), z
    total = h.sum(1).clamp_min(torch.finfo(torch.float32).tiny)
    c, x = hc.sum(1), hx.sum(1)
    spread = cc - c * c / total
    s = _bfloat16(torch.where(spread > 1e-6 * cc, (cx - c * x / total) / spread, s))
    return s, _bfloat16((x - s * c) / total)


def _bfloat16(values: Tensor) -> Tensor:
    return values.bfloat16().float()
