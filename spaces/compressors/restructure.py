"""A sub-block made narrower: whole heads or channels go, and what reads them makes up for it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import ROUND_CEILING, Decimal

import torch
from torch import Tensor

from apportion.errors import InvalidInput
from apportion.spaces.compressors.compensate import damped_root, live_moment
from apportion.spaces.compressors.importance import removed_units
from apportion.spaces.grammar import Option
from apportion.spaces.sites import Cut, Width

EXPERT_METHODS = ("drop", "merge", "magnitude")
UNIT_METHODS = ("obs", "wanda", "chip", "taylor", "first", "magnitude")


@dataclass(frozen=True)
class Narrowed:
    """A sub-block of fewer units.

    Attributes:
        kept: numbers of the units that stay, ascending.
        weights: float32 [out, in] of each cut of `Width.cuts`, narrower and corrected.
    """

    kept: tuple[int, ...]
    weights: tuple[Tensor, ...]


def kept_units(percent: Decimal, units: int) -> int:
    """How many of `units` stay when P % of them do, rounded down exactly."""
    return math.floor(percent * units / 100)


def width_refusal(percent: Decimal, width: Width) -> str | None:
    """Why cP% cannot be had of a sub-block, with what fits; None if it can."""
    units, name = width.units, f"{width.unit}{'' if width.units == 1 else 's'}"
    kept = kept_units(percent, units)
    if width.experts is not None and kept < width.experts.least:
        return _too_few(percent, width, width.experts.least)
    if 0 < kept < units:
        return None
    told = ""
    if units > 1:
        fitting, word = (units - 1, "most") if kept else (1, "least")
        nearest = (Decimal(100 * fitting) / units).quantize(Decimal("0.1"), ROUND_CEILING)
        told = f"; at {word} c{nearest.normalize():f}%"
    return f"c{percent}% keeps {'all' if kept else 'none'} of {units} {name}{told}"


def _too_few(percent: Decimal, width: Width, least: int) -> str:
    kept = kept_units(percent, width.units)
    nearest = (Decimal(100 * least) / width.units).quantize(Decimal("0.1"), ROUND_CEILING)
    return (
        f"c{percent}% keeps {kept} of {width.units} experts and a token is given to {least}; "
        f"at least c{nearest.normalize():f}%"
    )


def unit_refusal(option: Option, width: Width) -> str | None:
    """Why the method of cP% is not for these units, with those that are; None if it is."""
    asked = dict(option.methods).get("c")
    methods = EXPERT_METHODS if width.experts is not None else UNIT_METHODS
    if asked is not None and asked not in methods:
        fitting = ", ".join(methods)
        return f"{asked} does not say which {width.unit}s go; {fitting} do"
    if asked == "merge" and width.experts is not None and not width.experts.channels:
        return (
            "merge puts the channels of an expert into another one's order, which is not known "
            f"here, or experts have biases; there is {EXPERT_METHODS[0]}"
        )
    return None


def restructure(
    width: Width,
    weights: Sequence[Tensor],
    moments: Sequence[Tensor | None],
    percent: Decimal,
    method: str,
    scores: Tensor | None = None,
) -> Narrowed:
    """A sub-block with P % of its units, those that `removed_units` leaves.

    Producers lose rows: what they compute for the units that stay is as before. Consumers lose
    columns and, where their inputs' moment is known, are corrected as `corrected` says, whatever
    the method; but `first` is for weights that were trained to be narrower, and leaves them.

    Args:
        width: What the units are.
        weights: float32 [out, in] of each cut of `width.cuts`.
        moments: float64 [in, in], the sum of x x^T over what enters each group of `width.groups`;
            None: not known.
        percent: P.
        method: one of `UNIT_METHODS`.
        scores: float64 [units] of `gates.gate_scores`, for `taylor`.

    Raises:
        InvalidInput: No or all units would stay; a weight, a moment or a score is not finite or
            does not fit its member; the method needs a moment or scores that are not known.
    """
    if reason := width_refusal(percent, width):
        raise InvalidInput(reason)
    given = [moment for group, moment in zip(width.groups, moments, strict=True) for _ in group]
    for cut, weight, moment in zip(width.cuts, weights, given, strict=True):
        check_weight(cut, weight, moment)
    count = width.units - kept_units(percent, width.units)
    gone = set(removed_units(width, weights, moments, count, method, scores))
    kept = tuple(unit for unit in range(width.units) if unit not in gone)
    seen = [None] * len(given) if method == "first" else given
    narrowed = (
        _narrowed(cut, weight.detach().float(), moment, kept, width.units)
        for cut, weight, moment in zip(width.cuts, weights, seen, strict=True)
    )
    return Narrowed(kept, tuple(narrowed))


def narrowed_moment(cut: Cut, moment: Tensor, kept: Sequence[int], units: int) -> Tensor:
    """The second moment of what enters a member when only the `kept` units are there.

    Args:
        cut: How the member becomes narrower.
        moment: [in, in], of what enters it with all units.
        kept: numbers of the units that stay.
        units: how many there were.
    """
    if cut.side != "in":
        return moment
    stay = torch.tensor(cut.places(kept, units))
    return moment[stay[:, None], stay]


def corrected(weight: Tensor, second_moment: Tensor, stay: Tensor) -> Tensor:
    """float32 [out, stay]: the columns that stay, with the least error of the outputs.

    Least squares on the calibration inputs: with H the second moment, its diagonal raised as
    `regression` says, W' = W H_:S H_SS^-1 = W_S + W_R H_RS H_SS^-1, R what goes. The damping pulls
    toward the weights as they are and not toward zero, so the outputs' error is never larger than
    that of W_S. Dead inputs keep their weights. A hundredth of that damping lost at most 2 % less
    on the shipped model's layers, held out too.

    Args:
        weight: [out, in].
        second_moment: float64 [in, in], finite, the sum of x x^T.
        stay: int64 [stay], the columns that stay.
    """
    moment, _ = live_moment(second_moment)
    goes = torch.ones(weight.shape[1], dtype=torch.bool).index_fill(0, stay, False)
    exact = weight.double()
    lost = moment[stay][:, goes] @ exact[:, goes].T
    root = damped_root(moment[stay[:, None], stay])
    return (exact[:, stay] + torch.cholesky_solve(lost, root).T).float()


def _narrowed(
    cut: Cut, weight: Tensor, moment: Tensor | None, kept: Sequence[int], units: int
) -> Tensor:
    """float32 [out, in] of a member that only the kept units are left of."""
    if cut.side == "whole":
        return weight
    stay = torch.tensor(cut.places(kept, units))
    if cut.side != "in":
        return weight[stay]
    return weight[:, stay] if moment is None else corrected(weight, moment, stay)


def check_weight(cut: Cut, weight: Tensor, moment: Tensor | None) -> None:
    """Raise InvalidInput unless a member's weight and the moment of its inputs are finite and fit.

    Args:
        cut: of the member.
        weight: should be [out, in].
        moment: should be [in, in], or None.
    """
    path, shape = cut.member.path, cut.member.shape
    expected = (shape.out_features, shape.in_features)
    if tuple(weight.shape) != expected:
        raise InvalidInput(f"weight of {path} is {list(weight.shape)}, the layer {list(expected)}")
    if not weight.isfinite().all():
        raise InvalidInput(f"weight of {path} holds values that are not finite (NaN or infinite)")
    if moment is None:
        return
    if tuple(moment.shape) != (expected[1], expected[1]):
        sizes = list(moment.shape)
        raise InvalidInput(f"statistics of {path} are {sizes}, the layer has {expected[1]} inputs")
    if not moment.isfinite().all():
        raise InvalidInput("calibration inputs hold values that are not finite (NaN or infinite)")
