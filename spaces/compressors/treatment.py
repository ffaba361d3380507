"""A whole treatment of a sub-block: made narrower, and what is left compressed."""

from collections.abc import Sequence

from torch import Tensor

from apportion.errors import ApportionError
from apportion.spaces.compressors.compose import (
    RANK_MULTIPLE,
    InputStatistics,
    effective_methods,
    realize,
)
from apportion.spaces.compressors.experts import realize_experts
from apportion.spaces.compressors.restructure import narrowed_moment, restructure
from apportion.spaces.grammar import Option
from apportion.spaces.sites import Cut, Width
from apportion.spaces.stored import StoredSite


def realize_treatment(
    weights: Sequence[Tensor],
    width: Width,
    option: Option,
    statistics: Sequence[InputStatistics | None],
    model_dtype: str,
    rank_multiple: int = RANK_MULTIPLE,
) -> StoredSite:
    """`cP%` done to all weights of a sub-block, then the rest of the option to each of them.

    The rest is fitted on what is left: on narrower weights, and on the inputs of the kept units.

    Args:
        weights: float32 [out, in] of each cut of `width.cuts`.
        width: what the sub-block is wide by.
        option: with `cP%`; not refused.
        statistics: of what enters each group of `width.groups`; None: not known. Of experts one,
            what `Routing.of` takes.
        model_dtype: dtype of what the option leaves as it is.
        rank_multiple: ranks of rP% are multiples of it.

    Raises:
        InvalidInput: the option is refused, a method needs statistics that are not known, or
            weights or statistics are not finite.
    """
    if option.keep_percent is None:
        raise ApportionError(f"{option} is no treatment of a sub-block")
    if width.experts is not None:
        return realize_experts(weights, width, option, statistics[0], model_dtype, rank_multiple)
    moments = [None if found is None else found.second_moment for found in statistics]
    read = [s for s, group in zip(statistics, width.groups, strict=True) if _consumes(group)]
    method = effective_methods(option, has_statistics=all(read))["c"]
    narrow = restructure(width, weights, moments, option.keep_percent, method)
    given = [found for found, g in zip(statistics, width.groups, strict=True) for _ in g]
    stored = (
        realize(
            weight,
            cut.narrowed(len(narrow.kept)),
            option.rest,
            _left(cut, found, narrow.kept, width.units),
            model_dtype,
            rank_multiple,
        )
        for cut, weight, found in zip(width.cuts, narrow.weights, given, strict=True)
    )
    return StoredSite(tuple(stored), narrow.kept)


def _consumes(group: Sequence[Cut]) -> bool:
    return any(cut.side == "in" for cut in group)


def _left(
    cut: Cut, statistics: InputStatistics | None, kept: Sequence[int], units: int
) -> InputStatistics | None:
    """What enters a member when only the kept units are there."""
    if statistics is None:
        return None
    moment = narrowed_moment(cut, statistics.second_moment, kept, units)
    return InputStatistics(moment, statistics.tokens)
