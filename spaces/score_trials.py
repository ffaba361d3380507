"""Queries and keys tried out: changed so that their scores stay the same, if that is what they are.

If a score is q.k, any invertible matrix T may be put between the two: T k and T^-T q give the same.
If pairs of dimensions are turned by angles that depend on the token's place (rotary embeddings), T
may only be what commutes with that: a scaled rotation of each pair. And if queries or keys are
normed before (QK-norm), it may not even be a number for each head.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from apportion.spaces.sites import Cut, Member, Width
from apportion.spaces.trials import TOLERANCE, Run, difference
from apportion.spaces.values import LARGEST, SMALLEST, copies, random_change
from apportion.spaces.views import matrix_of

Change = Callable[[torch.Generator], Tensor]
"""Draws a matrix T, float64 [size, size]."""


@dataclass(frozen=True)
class Rows:
    """Rows of a member, as stacks of a head's dimensions.

    Attributes:
        member: the layer that gives them.
        stacks: for each key-value head the numbers of its stacks.
    """

    member: Member
    stacks: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Scores:
    """Rows that may be the queries and keys of scores.

    Attributes:
        size: dimensions of a head.
        keys: one stack for each key-value head.
        queries: as many stacks for each.
        swapped: keys are queries, and queries keys: whose bias softmax makes nothing of are keys.
    """

    size: int
    keys: Rows
    queries: Rows
    swapped: bool = False

    def width(self, heads: Width, pairs: Sequence[int]) -> Width:
        """The width of the sub-block in query-key dimensions."""
        groups = tuple(tuple(self._cut(cut.member) for cut in group) for group in heads.groups)
        units = len(self.keys.stacks) * self.size
        rotated = () if list(pairs) == list(range(self.size)) else tuple(pairs)
        return Width("query-key", units, groups, pairs=rotated)

    def _cut(self, member: Member) -> Cut:
        stacks = member.shape.out_features // self.size
        heads, keys = [-1] * stacks, list[int]()
        for rows in (self.keys, self.queries):
            if rows.member == member:
                for head, own in enumerate(rows.stacks):
                    for stack in own:
                        heads[stack] = head
                    keys += own if (rows is self.keys) is not self.swapped else ()
        if all(head < 0 for head in heads):
            return Cut(member, "whole")
        return Cut(member, "out", 1, stacks, heads=tuple(heads), keys=tuple(sorted(keys)))


@dataclass(frozen=True)
class ScoreTrial:
    """A sub-block that changed weights are tried in; its attributes are those of the search."""

    module: nn.Module
    dense: Tensor
    run: Run

    def holds(self, candidate: Scores, change: Change) -> bool:
        """Whether keys that are changed, and queries by the inverse, change nothing together."""
        generator = torch.Generator().manual_seed(0)
        drawn = [change(generator) for _ in candidate.keys.stacks]
        forward = self._changed({}, candidate.keys, drawn)
        inverse = [torch.linalg.inv(each).T for each in drawn]
        undone = self._changed(forward, candidate.queries, inverse)
        return difference(self._given(forward), self.dense, self._given(undone)) is None

    def multiplies(self, candidate: Scores) -> bool:
        """Whether a number for each head may be put between queries and keys."""
        return self.holds(candidate, _number(candidate.size))

    def is_normed(self, candidate: Scores) -> bool:
        """Whether queries or keys matter, but not a number that they are multiplied by."""
        heads, size = len(candidate.keys.stacks), candidate.size
        generator = torch.Generator().manual_seed(0)
        doubled = [2 * torch.eye(size, dtype=torch.float64)] * heads
        mixed = [random_change(size, generator)[0] for _ in range(heads)]
        return any(
            self._is_same(self._changed({}, rows, doubled))
            and not self._is_same(self._changed({}, rows, mixed))
            for rows in (candidate.keys, candidate.queries)
        )

    def is_swapped(self, candidate: Scores, pairs: Sequence[int]) -> bool:
        """Whether a constant that is added to the queries alone does not matter: they are keys.

        It is added where nothing is rotated.
        """
        weights = copies(self.module, candidate.queries.member)
        bias = weights.get(f"{candidate.queries.member.module}.bias")
        if bias is None or len(candidate.queries.stacks[0]) > 1:
            return False
        shift = torch.randn(candidate.size, generator=torch.Generator().manual_seed(0)).to(bias)
        free = torch.tensor([one == other for one, other in enumerate(pairs)])
        if not free.any():
            return False
        shift *= free
        for (stack,) in candidate.queries.stacks:
            bias.view(-1, candidate.size)[stack] += shift
        return self._is_same(weights)

    def _is_same(self, weights: Mapping[str, Tensor]) -> bool:
        change = self._given(weights) - self.dense
        return float(change.norm()) <= TOLERANCE * float(self.dense.norm())

    def _given(self, weights: Mapping[str, Tensor]) -> Tensor:
        def forward(*args: object, **keywords: object) -> object:
            return functional_call(self.module, dict(weights), args, keywords)

        return self.run(forward)

    def _changed(
        self, weights: Mapping[str, Tensor], rows: Rows, drawn: Sequence[Tensor]
    ) -> dict[str, Tensor]:
        """Weights by parameter path, in which rows of each head are multiplied by its matrix."""
        member, size = rows.member, len(drawn[0])
        own = copies(self.module, member)
        own |= {path: tensor.clone() for path, tensor in weights.items() if path in own}
        matrix = matrix_of(own[member.parameter_path], member)
        stacked = matrix.view(-1, size, member.shape.in_features)
        bias = own.get(f"{member.module}.bias")
        for head, stacks in enumerate(rows.stacks):
            change = drawn[head].to(stacked)
            for stack in stacks:
                stacked[stack] = change @ stacked[stack]
                if bias is not None:
                    offset = bias.view(-1, size)[stack]
                    offset.copy_(change @ offset)
        return {**weights, **own}


def rotated_pairs(trial: ScoreTrial, candidate: Scores) -> list[int] | None:
    """The dimension that each one is rotated with, itself where none; None: not known.

    Rotated are all or the first ones, i with i + half of them, or 2i with 2i + 1. Of the latter it
    is not asked how many are: the pairs behind may only seem to rest, because few tokens show no
    slow rotation. Halves are told from other halves by the fast ones.
    """
    size = candidate.size
    neighbors = [place ^ 1 for place in range(size)]
    for pairs in (list(range(size)), _halves(size, size), *([neighbors] if size % 2 == 0 else [])):
        if trial.holds(candidate, _within(pairs)):
            return pairs
    low, high = 0, size - size % 2  # the first `high` dimensions are not free, but all behind
    while high - low > 2:
        middle = (low + high) // 4 * 2
        free = trial.holds(candidate, _behind(middle, size))
        low, high = (low, middle) if free else (middle, high)
    for rotated in range(high, size, 2):
        if trial.holds(candidate, _within(pairs := _halves(rotated, size))):
            return pairs
    return None


def _halves(rotated: int, size: int) -> list[int]:
    """Pairs of the first `rotated` of `size` dimensions, an odd last one by itself."""
    half = rotated // 2
    return [*range(half, 2 * half), *range(half), *range(2 * half, size)]


def _number(size: int) -> Change:
    """A number, times the identity."""

    def draw(generator: torch.Generator) -> Tensor:
        drawn = torch.rand((), generator=generator, dtype=torch.float64)
        # No number near 1, which would change too little to be seen.
        return (SMALLEST if drawn < 0.5 else LARGEST) * torch.eye(size, dtype=torch.float64)

    return draw


def _within(pairs: Sequence[int]) -> Change:
    """A scaled rotation of each pair, and any invertible matrix of what is in none."""
    free = [one for one, other in enumerate(pairs) if one == other]

    def draw(generator: torch.Generator) -> Tensor:
        change = torch.zeros(len(pairs), len(pairs), dtype=torch.float64)
        if free:
            places = torch.tensor(free)
            change[places[:, None], places] = random_change(len(free), generator)[0]
        for one, other in enumerate(pairs):
            if one < other:
                angle, drawn = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
                scale = SMALLEST + (LARGEST - SMALLEST) * drawn
                turn, lift = scale * math.cos(6 * angle), scale * math.sin(6 * angle)
                change[one, one], change[one, other] = turn, -lift
                change[other, one], change[other, other] = lift, turn
        return change

    return draw


def _behind(first: int, size: int) -> Change:
    """Any invertible matrix of the dimensions from `first` on, nothing to those before."""

    def draw(generator: torch.Generator) -> Tensor:
        change = torch.eye(size, dtype=torch.float64)
        change[first:, first:] = random_change(size - first, generator)[0]
        return change

    return draw
