"""The values of attention in fewer dimensions: W_v and W_o of each head factorized as one product.

What a head adds is W_o a, a the average of its values W_v x + b with weights that sum to 1. So only
the product W_o W_v matters, and its best approximation of rank r is stored as a value matrix with r
rows and an output matrix with r columns: MoDeGPT (Lin and others, 2025, "MoDeGPT: Modular
Decomposition for Large Language Model Compression", its modules of type III). Query heads that
share a key-value head are stacked.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import ROUND_CEILING, Decimal

import torch
from torch import Tensor

from apportion.spaces.compressors.factorize import low_rank
from apportion.spaces.compressors.restructure import check_weight
from apportion.spaces.grammar import Option
from apportion.spaces.sites import Cut, Width


@dataclass(frozen=True)
class FewerValues:
    """Weights of a sub-block whose heads have fewer value dimensions.

    Attributes:
        weights: float32 [out, in] of each cut of `Width.cuts`.
        biases: of each cut [out], in the dtype that it had; None: there is none.
        transforms: float64 [heads, r, d], the new values of each key-value head in terms of the
            old ones.
    """

    weights: tuple[Tensor, ...]
    biases: tuple[Tensor | None, ...]
    transforms: Tensor


def kept_values(percent: Decimal, dimensions: int, rank_multiple: int) -> int:
    """How many of a head's value dimensions stay: P % rounded down to the multiple, exactly."""
    return int(percent * dimensions / 100) // rank_multiple * rank_multiple


def value_refusal(option: Option, width: Width, rank_multiple: int) -> str | None:
    """Why vP% and what follows it cannot be had of a sub-block, with what fits; None if it can.

    Args:
        option: with `vP%`.
        width: what `Width.values` is.
        rank_multiple: what stays is a multiple of it.
    """
    percent, size = option.value_percent, width.units
    if percent is not None and (
        reason := dimension_refusal("v", percent, size, rank_multiple, "value")
    ):
        return reason
    if option.static_activations:
        dynamic = str(option).replace("a8s", "a8")
        return f"a8s needs the range of the new values, which nobody saw; nearest: {dynamic}"
    return None


def dimension_refusal(
    step: str, percent: Decimal, size: int, multiple: int, kind: str
) -> str | None:
    """Why P % of a head's `size` dimensions of a kind cannot stay, with what fits; None if it can.

    Args:
        step: of the grammar, "v" or "q".
        percent: P.
        size: how many there are.
        multiple: what stays is a multiple of it.
        kind: what they are dimensions of.
    """
    if kept_values(percent, size, multiple):
        return None
    told = ""
    if multiple < size:
        least = (Decimal(100 * multiple) / size).quantize(Decimal("0.1"), ROUND_CEILING)
        told = f"; at least {step}{least.normalize():f}%"
    return f"{step}{percent}% of {size} {kind} dimensions is no multiple of {multiple}{told}"


def value_cuts(width: Width) -> tuple[Cut, Cut]:
    """How the value matrix becomes narrower, and the output matrix."""
    made, read = (next(c for c in width.cuts if c.side == side) for side in ("out", "in"))
    return made, read


def value_heads(made: Cut) -> Sequence[int]:
    """Which of the value matrix' stacks of d rows are values, one for each key-value head."""
    return made.narrowing or range(made.stacks)


def joint_pair(
    output: Tensor, value: Tensor, rank: int, second_moment: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(left [rows, rank], transform [rank, d]) float64, of least error of left @ transform @ value.

    The error is that of `low_rank` for the product output @ value: with S S^T = `second_moment` the
    Frobenius norm of (output @ value - left @ transform @ value) S, without it that of the weights.
    A QR decomposition of `output` leaves a product of only d rows to factorize, and what is cut off
    is orthogonal to what stays. With rank d nothing is.

    Args:
        output: [rows, d], rows >= d.
        value: [d, in].
        rank: at most d.
        second_moment: float64 [in, in], the sum of x x^T, or None.
    """
    basis, triangle = torch.linalg.qr(output.double())
    left, _ = low_rank(triangle @ value.double(), rank, second_moment)
    return basis @ left, left.T @ triangle


def fewer_values(
    width: Width,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    rank: int,
    second_moment: Tensor | None,
) -> FewerValues:
    """The weights of a sub-block whose heads have `rank` value dimensions.

    The value matrix' bias is a constant of what attention adds. What of it lies in the dimensions
    that stay is the new value bias; what does not is added to the output matrix' bias where it has
    one, and lost where not.

    Args:
        width: in value dimensions.
        weights: float32 [out, in] of each cut of `width.cuts`.
        biases: of each cut [out], or None.
        rank: how many of the `width.units` dimensions of a head stay.
        second_moment: float64 [in, in], the sum of x x^T over what enters the value matrix; None:
            not known, plain singular values decide.

    Raises:
        InvalidInput: a weight or the moment is not finite or does not fit its member.
    """
    made, read = value_cuts(width)
    place, reader = width.cuts.index(made), width.cuts.index(read)
    for number, moment in ((place, second_moment), (reader, None)):
        check_weight(width.cuts[number], weights[number], moment)
    size, heads, out = width.units, value_heads(made), len(weights[reader])
    rows, bias = list(torch.split(weights[place].double(), size)), biases[place]
    constant = torch.zeros(len(rows) * size) if bias is None else bias.detach()
    offsets = list(torch.split(constant.double(), size))
    # [out, key-value heads, queries of each, d]
    outputs = weights[reader].double().view(out, len(heads), -1, size)
    lefts, transforms, lost = [], [], torch.zeros(out, dtype=torch.float64)
    for number, head in enumerate(heads):
        stacked = outputs[:, number].transpose(0, 1).reshape(-1, size)
        left, transform = joint_pair(stacked, rows[head], rank, second_moment)
        gone = stacked @ offsets[head] - left @ (transform @ offsets[head])
        lost += gone.view(-1, out).sum(0)
        rows[head], offsets[head] = transform @ rows[head], transform @ offsets[head]
        lefts.append(left.view(-1, out, rank).transpose(0, 1))
        transforms.append(transform)
    new, shifted = list(weights), list(biases)
    new[place], new[reader] = torch.cat(rows).float(), torch.cat(lefts, 1).reshape(out, -1).float()
    if bias is not None:
        shifted[place] = torch.cat(offsets).to(bias.dtype)
        if (held := biases[reader]) is not None:
            shifted[reader] = (held.double() + lost).to(held.dtype)
    return FewerValues(tuple(new), tuple(shifted), torch.stack(transforms))


def output_moment(second_moment: Tensor, transforms: Tensor) -> Tensor:
    """The second moment of what enters the output matrix when heads give their new values.

    Exact: attention averages values, so what it gives changes as they do.

    Args:
        second_moment: float64 [heads * d, heads * d] of what enters it with all dimensions.
        transforms: float64 [key-value heads, r, d].
    """
    heads, rank, size = transforms.shape
    queries = len(second_moment) // (heads * size)
    each = transforms.repeat_interleave(queries, 0)
    blocks = second_moment.view(heads * queries, size, heads * queries, size)
    changed = torch.einsum("arc,acbd,bsd->arbs", each, blocks, each)
    return changed.reshape(heads * queries * rank, -1)
