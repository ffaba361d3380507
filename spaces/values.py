"""Finds which rows of attention are its values, and proves it: what `vP%` is done to.

Nothing here lists models by name. If what a head adds is W_o a and a an average of W_v x + b, then
any invertible matrix T may be put between the two: T W_v, T b and W_o T^-1 give the same. And if
the weights of that average sum to 1, what is added to b may be taken from the bias behind W_o. For
queries and keys neither holds, nor does it for values that are normed or gated before W_o. So each
candidate is changed in that way, each head by another random matrix, and the sub-block is run.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from apportion.spaces.apply import bias_of
from apportion.spaces.sites import Cut, Member, Width
from apportion.spaces.trials import NotRun, Run, difference
from apportion.spaces.views import matrix_of, parameter_at

LARGEST, SMALLEST = 1.5, 0.75
"""Of the singular values of T: it is no rotation, which a norm lets through, nor near singular."""


@torch.no_grad()
def find_values(module: nn.Module, width: Width, dense: Tensor, run: Run) -> Width | str:
    """The width of an attention sub-block in value dimensions, or why it has none.

    Args:
        module: the sub-block, in float32 or float64.
        width: its width in heads, with paths below it.
        dense: what it gives.
        run: calls it on what it was given.
    """
    read = [cut for cut in width.cuts if cut.side == "in"]
    if len(read) != 1 or any(cut.side == "groups" or cut.member.shape.conv for cut in width.cuts):
        return "its values are not made by one linear layer and read by another"
    found = [each for each in _candidates(width, read[0]) if _is_value(module, each, dense, run)]
    if len(found) == 1:
        return found[0].width(width)
    reader = read[0].member.module
    if found:
        return f"what {reader} reads may be values of {len(found)} kinds, and which cannot be told"
    return (
        f"what {reader} reads is no plain average of what one layer gives: values that are normed, "
        "gated, shared with keys, or averaged with weights that do not sum to 1 stay as they are"
    )


@dataclass(frozen=True)
class _Candidate:
    """Rows that may be values.

    Attributes:
        made: the member with them, as a row of stacks of `size` rows.
        size: dimensions of a head.
        heads: which stacks are the candidate's, one for each key-value head.
        read: the member that reads them.
    """

    made: Member
    size: int
    heads: tuple[int, ...]
    read: Member

    @property
    def cuts(self) -> tuple[Cut, Cut]:
        """Of both members in value dimensions."""
        stacks = self.made.shape.out_features // self.size
        narrowing = self.heads if len(self.heads) < stacks else ()
        queries = self.read.shape.in_features // self.size
        made = Cut(self.made, "out", 1, stacks, narrowing)
        return made, Cut(self.read, "in", 1, queries)

    def width(self, heads: Width) -> Width:
        """The width of the sub-block in value dimensions."""
        cuts = {cut.member: cut for cut in self.cuts}
        groups = (
            tuple(cuts.get(cut.member, Cut(cut.member, "whole")) for cut in group)
            for group in heads.groups
        )
        return Width("value", self.size, tuple(groups))


def _candidates(width: Width, read: Cut) -> Iterator[_Candidate]:
    """What one layer gives for each key-value head, in pieces as large as one head may read.

    Of a head with more dimensions than the sub-block gives, the product could not have all of them.
    """
    most = read.member.shape.out_features
    given = [cut for cut in width.cuts if cut.side == "out"]
    if width.units == len(given) == 1:
        yield from (each for each in _last_rows(given[0].member, read.member) if each.size <= most)
    for cut in given:
        size = math.gcd(cut.features, read.features)
        pieces = cut.features // size if size <= most else 0
        for stack in range(cut.stacks):
            for piece in range(pieces):
                firsts = (stack * width.units + unit for unit in range(width.units))
                heads = tuple(first * pieces + piece for first in firsts)
                yield _Candidate(cut.member, size, heads, read.member)


def _last_rows(made: Member, read: Member) -> Iterator[_Candidate]:
    """Values behind queries and as many keys as values in one matrix, fewer heads than queries.

    These lie at unlike distances, so how many heads there are is not known.
    """
    rows, queries = made.shape.out_features, read.shape.in_features
    values = (rows - queries) // 2
    if values < 1 or queries % values or queries == values:
        return
    for heads in range(1, values + 1):
        if values % heads == 0:
            size = values // heads
            yield _Candidate(made, size, tuple(range(rows // size - heads, rows // size)), read)


def _is_value(module: nn.Module, candidate: _Candidate, dense: Tensor, run: Run) -> bool:
    """Whether a change of the candidate that is undone behind it changes nothing, else it does."""
    forward, undone = _changed(module, candidate)

    def given(weights: dict[str, Tensor]) -> Tensor:
        return run(lambda *args, **keywords: functional_call(module, weights, args, keywords))

    try:
        return difference(given(forward), dense, given(forward | undone)) is None
    except NotRun:
        return False


def _changed(
    module: nn.Module, candidate: _Candidate
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(weights of the candidate changed, weights behind it that undo that), by parameter path."""
    made, read, size = candidate.made, candidate.read, candidate.size
    forward, undone = copies(module, made), copies(module, read)
    bias, behind = forward.get(f"{made.module}.bias"), undone.get(f"{read.module}.bias")
    values = matrix_of(forward[made.parameter_path], made).view(-1, size, made.shape.in_features)
    queries = read.shape.in_features // (size * len(candidate.heads))
    columns = (read.shape.out_features, len(candidate.heads), queries, size)
    outputs = matrix_of(undone[read.parameter_path], read).view(columns)
    generator = torch.Generator().manual_seed(0)
    for number, head in enumerate(candidate.heads):
        change, undo, shift = (each.to(values) for each in random_change(size, generator))
        values[head] = change @ values[head]
        outputs[:, number] = outputs[:, number] @ undo
        if bias is not None:
            offset = bias.view(-1, size)[head]
            offset.copy_(change @ offset)
            if behind is not None:
                offset += shift
                behind -= (outputs[:, number] @ shift).sum(1)
    return forward, undone


def copies(module: nn.Module, member: Member) -> dict[str, Tensor]:
    """Weight and, where there is one, bias of a layer, by parameter path."""
    found = {member.parameter_path: parameter_at(module, member.parameter_path)}
    if (bias := bias_of(module, member.module)) is not None:
        found[f"{member.module}.bias"] = bias
    return {path: tensor.detach().contiguous().clone() for path, tensor in found.items()}


def random_change(size: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """An invertible matrix [size, size], its inverse, and a vector [size], all float64."""
    normal = torch.randn(2, size, size, generator=generator, dtype=torch.float64)
    (left, right), _ = torch.linalg.qr(normal)
    drawn = torch.rand(size, generator=generator, dtype=torch.float64)
    scales = SMALLEST + (LARGEST - SMALLEST) * drawn
    shift = torch.randn(size, generator=generator, dtype=torch.float64)
    return left * scales @ right, right.T / scales @ left.T, shift
