"""Finds which rows of attention are its queries and keys, and proves it: what `qP%` is done to.

Nothing here lists models by name. What one layer gives for each key-value head may be keys, what
another or the same gives may be queries. Candidates are changed by a number first, which tells what
queries and keys are, and then by matrices, which tells what is done to them (`score_trials`).
"""

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from apportion.spaces.score_trials import Rows, Scores, ScoreTrial, rotated_pairs
from apportion.spaces.sites import Cut, Member, Width
from apportion.spaces.trials import NotRun, Run


@torch.no_grad()
def find_query_keys(module: nn.Module, width: Width, dense: Tensor, run: Run) -> Width | str:
    """The width of an attention sub-block in query-key dimensions, or why it has none.

    Args:
        module: the sub-block, in float32 or float64.
        width: its width in heads, with paths below it.
        dense: what it gives.
        run: calls it on what it was given.
    """
    read = [cut for cut in width.cuts if cut.side == "in"]
    if len(read) != 1 or any(cut.side == "groups" or cut.member.shape.conv for cut in width.cuts):
        return "its queries and keys are not made by linear layers"
    trial = ScoreTrial(module, dense, run)
    normed = False
    for candidate in _candidates(width, read[0]):
        try:
            if not trial.multiplies(candidate):
                normed = normed or trial.is_normed(candidate)
                continue
            pairs = rotated_pairs(trial, candidate)
        except NotRun:
            continue
        if pairs is not None:
            swapped = trial.is_swapped(candidate, pairs)
            return replace(candidate, swapped=swapped).width(width, pairs)
    if normed:
        return (
            "its queries or keys are normed before their product (QK-norm): the norm of all "
            "dimensions is not that of some of them"
        )
    return (
        "its scores are no plain products of what its layers give: queries and keys that are "
        "normed, gated, shared with values, or rotated in an unknown way stay as they are"
    )


def _candidates(width: Width, read: Cut) -> Iterator[Scores]:
    """Keys of a layer with queries of another one or of the same; of two alike in one order only.

    One stack of rows for each key-value head are keys; in the same layer some stacks in a row are
    queries, as many as there are query heads; all rows of another layer.
    """
    given = [cut for cut in width.cuts if cut.side == "out"]
    if width.units == len(given) == 1:
        yield from _first_rows(given[0].member, read.member)
    for place, cut in enumerate(given):
        for other in given[place + 1 :]:
            small, large = sorted((cut, other), key=lambda each: each.features * each.stacks)
            rows = small.features
            if small.stacks == 1 and large.features % rows == 0:
                keys, queries = (_all_rows(each, width.units, rows) for each in (small, large))
                yield Scores(rows, keys, queries)
        size = math.gcd(cut.features, read.features)
        pieces, queries_of_key = cut.features // size, read.features // size
        stacks = [
            [(stack * width.units + unit) * pieces + piece for unit in range(width.units)]
            for stack in range(cut.stacks)
            for piece in range(pieces)
        ]
        for key, own in enumerate(stacks):
            for first in range(len(stacks) - queries_of_key + 1):
                if first <= key < first + queries_of_key or (queries_of_key == 1 and first > key):
                    continue
                run = zip(*stacks[first : first + queries_of_key], strict=True)
                keys = Rows(cut.member, tuple((stack,) for stack in own))
                yield Scores(size, keys, Rows(cut.member, tuple(run)))


def _all_rows(cut: Cut, units: int, size: int) -> Rows:
    """All rows that a cut gives for each key-value head."""
    pieces = cut.features // size
    return Rows(
        cut.member,
        tuple(
            tuple(
                (stack * units + unit) * pieces + piece
                for stack in range(cut.stacks)
                for piece in range(pieces)
            )
            for unit in range(units)
        ),
    )


def _first_rows(made: Member, read: Member) -> Iterator[Scores]:
    """Queries and then fewer keys, and as many values as keys, in one matrix (cf. `_last_rows`)."""
    rows, queries = made.shape.out_features, read.shape.in_features
    keys = (rows - queries) // 2
    if keys < 1 or queries % keys or queries == keys:
        return
    for heads in range(1, keys + 1):
        if keys % heads == 0:
            each, first = queries // keys, heads * queries // keys
            yield Scores(
                keys // heads,
                Rows(made, tuple((first + head,) for head in range(heads))),
                Rows(made, tuple(tuple(range(h * each, (h + 1) * each)) for h in range(heads))),
            )
