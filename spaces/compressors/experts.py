"""Fewer experts: which go, and what is left of them in those that stay.

- `drop`: those that add least go: the sum over calibration tokens of gate times the norm of the
  expert's output. That is the criterion of REAP (Lasby and others, 2025), summed over all tokens
  and not averaged over the expert's own, so that how often it is chosen counts too. Lu and others
  (2024, "Not All Experts are Equal") and MoE-I2 (Yang and others, 2024) try sets of experts for the
  least loss of the layer instead; what goes, goes in the same way, with its row of the router.
- `merge`: those chosen least often go, each into the one that stays whose logits over calibration
  tokens are most alike (cosine): its channels are put into the order in which they match best
  (weight matching of "Git Re-Basin", Ainsworth and others, 2023), and the weights are averaged by
  how often each was chosen. So does MC-SMoE (Li and others, 2024), which keeps all rows of the
  router; here the tokens of an expert that goes are sent to the best of those that stay.
- `magnitude`: the least product of the norms of its matrices. It needs no data.

Of equal experts the first goes first.
"""

from collections.abc import Sequence

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from apportion.errors import ApportionError, InvalidInput
from apportion.spaces.compressors.compose import InputStatistics, realize
from apportion.spaces.compressors.restructure import kept_units, width_refusal
from apportion.spaces.grammar import Option
from apportion.spaces.layouts import reordered
from apportion.spaces.routing import Routing
from apportion.spaces.sites import Cut, Width
from apportion.spaces.stored import StoredSite

WITHOUT_ROUTING = "magnitude"


def realize_experts(
    weights: Sequence[Tensor],
    width: Width,
    option: Option,
    statistics: InputStatistics | None,
    model_dtype: str,
    rank_multiple: int,
) -> StoredSite:
    """`cP%` of experts, then the rest of the option done to all weights that stay.

    Args:
        weights: float32 [out, in] of each cut of `width.cuts`.
        width: a width in experts.
        option: with `cP%`; not refused.
        statistics: what `Routing.of` takes; None: not known. Of no token: as not known, whatever
            method is asked for.
        model_dtype: dtype of what the option leaves as it is.
        rank_multiple: ranks of rP% are multiples of it.

    Raises:
        InvalidInput: the option is refused, a method needs statistics that are not known, or
            weights are not finite.
    """
    if option.keep_percent is None:
        raise ApportionError(f"{option} is no treatment of a sub-block")
    if reason := width_refusal(option.keep_percent, width):
        raise InvalidInput(reason)
    for cut, weight in zip(width.cuts, weights, strict=True):
        if not weight.isfinite().all():
            path = cut.member.path
            raise InvalidInput(
                f"weight of {path} holds values that are not finite (NaN or infinite)"
            )
    routing = None if statistics is None or not statistics.tokens else Routing.of(statistics)
    method = _method(option, statistics)
    size, units = len(width.groups[0]), width.units
    experts = [weights[first : first + size] for first in range(0, size * units, size)]
    count = units - kept_units(option.keep_percent, units)
    gone = removed_experts(experts, routing, count, method)
    kept = tuple(unit for unit in range(units) if unit not in set(gone))
    if method == "merge" and routing is not None and width.experts is not None:
        left = merged(experts, width.experts.channels, routing, kept)
    else:
        left = [list(experts[unit]) for unit in kept]
    matrices = [*(matrix for expert in left for matrix in expert), *weights[size * units :]]
    stored = (
        realize(matrix, member.shape, option.rest, None, model_dtype, rank_multiple)
        for matrix, member in zip(matrices, width.members(len(kept)), strict=True)
    )
    return StoredSite(tuple(stored), kept)


def _method(option: Option, statistics: InputStatistics | None) -> str:
    """The method that was asked for, else `drop`; `magnitude` where no token came by."""
    asked = dict(option.methods).get("c")
    if statistics is None and asked not in (None, WITHOUT_ROUTING):
        raise InvalidInput(
            f'option "{option}": {asked} needs calibration statistics and these experts have none;'
            f" ask for {WITHOUT_ROUTING}, or for no method"
        )
    return WITHOUT_ROUTING if statistics is None or not statistics.tokens else asked or "drop"


def removed_experts(
    experts: Sequence[Sequence[Tensor]], routing: Routing | None, count: int, method: str
) -> list[int]:
    """The numbers of the `count` experts that go, the first to go first.

    Args:
        experts: matrices [out, in] of each expert.
        routing: what calibration saw; not needed for `magnitude`.
        count: how many go, fewer than there are.
        method: one of `EXPERT_METHODS`.
    """
    if method == WITHOUT_ROUTING or routing is None:
        scores = torch.stack([magnitude(expert) for expert in experts])
    else:
        scores = routing.added if method == "drop" else routing.counts
    return scores.argsort(stable=True)[:count].tolist()


def magnitude(expert: Sequence[Tensor]) -> Tensor:
    """float64: the logarithm of the product of the norms of an expert's matrices."""
    return torch.stack([matrix.double().norm().log() for matrix in expert]).sum()


def merged(
    experts: Sequence[Sequence[Tensor]],
    channels: Sequence[Cut],
    routing: Routing,
    kept: Sequence[int],
) -> list[list[Tensor]]:
    """The experts that stay, each averaged with those that go into it.

    Args:
        experts: float32 matrices [out, in] of each expert.
        channels: how each matrix of an expert holds its channels.
        routing: what calibration saw.
        kept: numbers of the experts that stay.

    Returns:
        float32 matrices of each of `kept`, summed in float64.
    """
    likeness = similarities(routing.logits)[:, list(kept)]
    into = {unit: [unit] for unit in kept}
    for unit in range(len(experts)):
        if unit not in into:
            into[kept[int(likeness[unit].argmax())]].append(unit)
    return [_average(experts, channels, routing.counts, into[unit]) for unit in kept]


def similarities(logits: Tensor) -> Tensor:
    """float64 [experts, experts]: cosines of two experts' logits over all tokens.

    Args:
        logits: float64 [experts, experts], the sum of l l^T over tokens.
    """
    norms = logits.diagonal().sqrt().clamp_min(torch.finfo(torch.float64).tiny)
    return logits / norms[:, None] / norms


def _average(
    experts: Sequence[Sequence[Tensor]], channels: Sequence[Cut], counts: Tensor, units: list[int]
) -> list[Tensor]:
    """Experts averaged by how often they were chosen, in the first one's order of channels."""
    total = counts[units].sum()
    if total == 0 or len(units) == 1:
        return list(experts[units[0]])
    sums = [matrix.double() * (counts[units[0]] / total) for matrix in experts[units[0]]]
    for unit in units[1:]:
        order = alignment(experts[units[0]], experts[unit], channels)
        for place, cut in enumerate(channels):
            matrix = reordered(experts[unit][place], cut, order).double()
            sums[place] += matrix * (counts[unit] / total)
    return [matrix.float() for matrix in sums]


def alignment(
    stays: Sequence[Tensor], goes: Sequence[Tensor], channels: Sequence[Cut]
) -> list[int]:
    """The channel of `goes` for each channel of `stays` with which it matches best.

    The order of the largest sum of inner products between the weights of matched channels.

    Args:
        stays: matrices [out, in] of one expert.
        goes: those of the other.
        channels: how each matrix holds the channels.
    """
    products = torch.stack(
        [
            _by_channel(one, cut) @ _by_channel(other, cut).T
            for one, other, cut in zip(stays, goes, channels, strict=True)
        ]
    ).sum(0)
    _, order = linear_sum_assignment(products.numpy(), maximize=True)
    found: list[int] = order.tolist()
    return found


def _by_channel(matrix: Tensor, cut: Cut) -> Tensor:
    """float64 [channels, ...]: all weights of each channel."""
    held = matrix.T if cut.side == "in" else matrix
    channels = len(held) // (cut.features * cut.stacks)
    places = torch.tensor([cut.places([unit], channels) for unit in range(channels)])
    return held.double()[places].flatten(1)
