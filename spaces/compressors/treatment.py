"""A whole treatment of a sub-block: made narrower, and what is left compressed."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from apportion.errors import ApportionError
from apportion.spaces.compressors.compose import (
    RANK_MULTIPLE,
    InputStatistics,
    effective_methods,
    realize,
)
from apportion.spaces.compressors.experts import realize_experts
from apportion.spaces.compressors.query_keys import fewer_query_keys, kept_query_keys
from apportion.spaces.compressors.restructure import narrowed_moment, restructure
from apportion.spaces.compressors.values import fewer_values, kept_values, output_moment, value_cuts
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
    scores: Tensor | None = None,
    biases: Sequence[Tensor | None] | None = None,
) -> StoredSite:
    """`cP%`, `vP%` or `qP%` done to all weights of a sub-block, then the option's rest to each.

    The rest is fitted on what is left: on narrower weights, and on the inputs of the kept units.

    Args:
        weights: float32 [out, in] of each cut of `width.cuts`.
        width: what the sub-block is wide by; for `vP%` in value, for `qP%` in query-key dimensions.
        option: with `cP%`, `vP%` or `qP%`; not refused.
        statistics: of what enters each group of `width.groups`; None: not known. Of experts one,
            what `Routing.of` takes.
        model_dtype: dtype of what the option leaves as it is.
        rank_multiple: ranks of rP% are multiples of it.
        scores: float64 [units] of `gates.gate_scores`, where the option needs them.
        biases: of each cut [out], or None, which `vP%` and `qP%` change too; None: there are none.

    Raises:
        InvalidInput: the option is refused, a method needs statistics that are not known, or
            weights or statistics are not finite.
    """
    if not option.narrows:
        raise ApportionError(f"{option} is no treatment of a sub-block")
    if width.experts is not None:
        return realize_experts(weights, width, option, statistics[0], model_dtype, rank_multiple)
    if option.dimension_percent is not None:
        own = biases or [None] * len(weights)
        fewer = _with_fewer_values if option.value_percent else _with_fewer_query_keys
        left = fewer(weights, own, width, option, statistics, rank_multiple)
    else:
        left = _with_fewer_units(weights, width, option, statistics, scores)
    stored = (
        realize(weight, cut.narrowed(len(left.kept)), option.rest, seen, model_dtype, rank_multiple)
        for cut, weight, seen in zip(width.cuts, left.weights, left.statistics, strict=True)
    )
    return StoredSite(tuple(stored), left.kept, biases=left.biases)


@dataclass(frozen=True)
class _Left:
    """What is left of a sub-block, before the rest of the option is done to it.

    Attributes:
        kept: numbers of the units that stay.
        weights: float32 [out, in] of each cut.
        statistics: of what enters each cut now.
        biases: as `StoredSite` holds them.
    """

    kept: tuple[int, ...]
    weights: tuple[Tensor, ...]
    statistics: tuple[InputStatistics | None, ...]
    biases: tuple[Tensor | None, ...] = ()


def _with_fewer_units(
    weights: Sequence[Tensor],
    width: Width,
    option: Option,
    statistics: Sequence[InputStatistics | None],
    scores: Tensor | None,
) -> _Left:
    if option.keep_percent is None:
        raise ApportionError(f"{option} keeps no units")
    moments = [None if found is None else found.second_moment for found in statistics]
    read = [s for s, group in zip(statistics, width.groups, strict=True) if _consumes(group)]
    method = effective_methods(option, has_statistics=all(read))["c"]
    narrow = restructure(width, weights, moments, option.keep_percent, method, scores)
    seen = (
        _left(cut, found, narrow.kept, width.units)
        for cut, found in zip(width.cuts, _by_cut(width, statistics), strict=True)
    )
    return _Left(narrow.kept, narrow.weights, tuple(seen))


def _with_fewer_values(
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    width: Width,
    option: Option,
    statistics: Sequence[InputStatistics | None],
    rank_multiple: int,
) -> _Left:
    if option.value_percent is None:
        raise ApportionError(f"{option} keeps no value dimensions")
    rank = kept_values(option.value_percent, width.units, rank_multiple)
    made, read = value_cuts(width)
    given = dict(zip(width.cuts, _by_cut(width, statistics), strict=True))
    entering, between = given[made], given[read]
    method = effective_methods(option, has_statistics=entering is not None)["v"]
    whitening = None if entering is None or method == "svd" else entering.second_moment
    fewer = fewer_values(width, weights, biases, rank, whitening)
    if between is not None:
        moment = output_moment(between.second_moment, fewer.transforms)
        given[read] = InputStatistics(moment, between.tokens)
    return _Left(tuple(range(rank)), fewer.weights, tuple(given.values()), fewer.biases)


def _with_fewer_query_keys(
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    width: Width,
    option: Option,
    statistics: Sequence[InputStatistics | None],
    rank_multiple: int,
) -> _Left:
    if option.query_key_percent is None:
        raise ApportionError(f"{option} keeps no query-key dimensions")
    given = _by_cut(width, statistics)
    known = all(seen for cut, seen in zip(width.cuts, given, strict=True) if cut.heads)
    method = effective_methods(option, has_statistics=known)["q"]
    seen = [None] * len(given) if method == "svd" else given
    count = kept_query_keys(option.query_key_percent, width, rank_multiple)
    fewer = fewer_query_keys(width, weights, biases, count, seen)
    return _Left(fewer.kept, fewer.weights, tuple(given), fewer.biases)


def _by_cut(
    width: Width, statistics: Sequence[InputStatistics | None]
) -> list[InputStatistics | None]:
    """Those of each group, for each of its cuts."""
    return [found for found, g in zip(statistics, width.groups, strict=True) for _ in g]


def _consumes(group: Sequence[Cut]) -> bool:
    return any(cut.side == "in" for cut in group)


def _left(
    cut: Cut, statistics: InputStatistics | None, kept: Sequence[int], units: int
) -> InputStatistics | None:
    """What enters a member when only the kept units are there."""
    if statistics is None:
        return None
    moment = narrowed_moment(cut, statistics.second_moment, kept, units)
    peak = statistics.peak
    if peak is not None and cut.side == "in":
        peak = peak[cut.places(kept, units)]
    return InputStatistics(moment, statistics.tokens, peak)
