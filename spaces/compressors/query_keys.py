"""Queries and keys of attention in fewer dimensions: what is approximated are their scores.

A score is q.k with q = W_q x + b_q and k = W_k y + b_k. Where nothing is done to q and k before
their product, only W_q^T W_k matters, and its best approximation of rank r is stored as r rows of
each: ComCAT (Xiao and others, 2023, "COMCAT: Towards Efficient Compression and Customization of
Attention-Based Vision Models"). Where rotary embeddings turn pairs of dimensions, the pairs that
add most stay as they are: MoDeGPT (Lin and others, 2025, "MoDeGPT: Modular Decomposition for Large
Language Model Compression", its modules of type II). Queries that share a key are stacked.

Softmax makes nothing of what all scores of a query have in common, and without a rotation the bias
b_k adds just that: it has no say, and becomes what it is in the new dimensions. The bias b_q counts
as the weights of an input that is always 1, and of which the others know nothing: the mean of the
inputs is not among the statistics.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal

import torch
from torch import Tensor

from apportion.spaces.compressors.compose import InputStatistics
from apportion.spaces.compressors.factorize import DAMPING
from apportion.spaces.compressors.restructure import check_weight
from apportion.spaces.compressors.values import dimension_refusal, kept_values
from apportion.spaces.sites import Cut, Width

NO_STRENGTH = 1e-7
"""Of the largest singular value: what is smaller is rounding of the products that give them."""


@dataclass(frozen=True)
class FewerQueryKeys:
    """Weights of a sub-block whose queries and keys have fewer dimensions.

    Attributes:
        kept: numbers of the units of the width that stay, ascending; as many of each head.
        weights: float32 [out, in] of each cut of `Width.cuts`.
        biases: of each cut [out], in the dtype that it had; None: there is none.
    """

    kept: tuple[int, ...]
    weights: tuple[Tensor, ...]
    biases: tuple[Tensor | None, ...]


def kept_query_keys(percent: Decimal, width: Width, rank_multiple: int) -> int:
    """How many dimensions of a head stay: P % rounded down to the multiple, even of pairs."""
    return kept_values(percent, _size(width), _multiple(width, rank_multiple))


def query_key_refusal(percent: Decimal, width: Width, rank_multiple: int) -> str | None:
    """Why qP% cannot be had of a sub-block, with what fits; None if it can."""
    multiple = _multiple(width, rank_multiple)
    return dimension_refusal("q", percent, _size(width), multiple, "query-key")


def _size(width: Width) -> int:
    """Query-key dimensions of a head."""
    return width.units // width.heads


def _multiple(width: Width, rank_multiple: int) -> int:
    return math.lcm(2, rank_multiple) if width.pairs else rank_multiple


def fewer_query_keys(
    width: Width,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    count: int,
    statistics: Sequence[InputStatistics | None],
) -> FewerQueryKeys:
    """The weights of a sub-block whose queries and keys have `count` dimensions in each head.

    Args:
        width: in query-key dimensions.
        weights: float32 [out, in] of each cut of `width.cuts`.
        biases: of each cut [out], or None.
        count: how many dimensions of a head stay; even where some are rotated.
        statistics: of what enters each cut; None: not known, all inputs count alike.

    Raises:
        InvalidInput: a weight or a moment is not finite or does not fit its member.
    """
    size = _size(width)
    layers = {
        place: _Layer.of(cut, weights[place], biases[place], statistics[place])
        for place, cut in enumerate(width.cuts)
        if cut.heads
    }
    kept = list[int]()
    for head in range(width.heads):
        queries, keys, fixed = (torch.zeros(size, size, dtype=torch.float64) for _ in range(3))
        for layer in layers.values():
            for stack in layer.stacks_of(head):
                if stack in layer.cut.keys:
                    keys += layer.products[stack]
                    fixed += layer.constants[stack]
                else:
                    queries += layer.products[stack] + layer.constants[stack]
        dimensions = fewer_dimensions(queries, keys, fixed, width.pairs, count)
        kept += [head * size + place for place in dimensions.places]
        for layer in layers.values():
            for stack in layer.stacks_of(head):
                layer.transform(
                    stack, dimensions.keys if stack in layer.cut.keys else dimensions.queries
                )
    new, shifted = list(weights), list(biases)
    for place, layer in layers.items():
        new[place] = torch.cat(layer.rows).float()
        if (bias := biases[place]) is not None:
            shifted[place] = torch.cat(layer.offsets).to(bias.dtype)
    return FewerQueryKeys(tuple(kept), tuple(new), tuple(shifted))


@dataclass(frozen=True)
class _Layer:
    """A member that gives queries or keys, as stacks of a head's rows.

    Attributes:
        cut: how it becomes narrower.
        rows: of each stack float64 [d, in].
        offsets: of each stack its bias [d], zeros without one.
        products: of each stack [d, d], the second moment of W x over calibration's inputs, divided
            by the mean square of an input.
        constants: likewise of the bias.
    """

    cut: Cut
    rows: list[Tensor]
    offsets: list[Tensor]
    products: list[Tensor]
    constants: list[Tensor]

    @classmethod
    def of(
        cls, cut: Cut, weight: Tensor, bias: Tensor | None, seen: InputStatistics | None
    ) -> "_Layer":
        moment = None if seen is None else seen.second_moment
        check_weight(cut, weight, moment)
        exact, size = weight.double(), len(weight) // cut.stacks
        constant = exact.new_zeros(len(exact)) if bias is None else bias.detach().double()
        taken, share = exact, 1.0
        if seen is not None and (mean := float(seen.second_moment.diagonal().mean())) > 0:
            # Raised as in `low_rank`: directions that no input took are ordered by the weights.
            taken = (exact @ seen.second_moment).div_(mean).add_(exact, alpha=DAMPING)
            share = seen.tokens / mean
        rows, offsets = list(torch.split(exact, size)), list(torch.split(constant, size))
        products = [own @ each.T for own, each in zip(torch.split(taken, size), rows, strict=True)]
        return cls(cut, rows, offsets, products, [share * torch.outer(b, b) for b in offsets])

    def stacks_of(self, head: int) -> list[int]:
        """Numbers of the stacks that are of a key-value head."""
        return [stack for stack, own in enumerate(self.cut.heads) if own == head]

    def transform(self, stack: int, into: Tensor) -> None:
        """Put `into` [r, d] @ rows in the place of a stack's rows."""
        self.rows[stack] = into @ self.rows[stack]
        self.offsets[stack] = into @ self.offsets[stack]


@dataclass(frozen=True)
class Dimensions:
    """The dimensions that a head has left.

    Attributes:
        places: which of the old ones they stand in the place of, ascending.
        queries: float64 [r, d], they are these combinations of the old ones in queries.
        keys: float64 [r, d], likewise in keys.
    """

    places: tuple[int, ...]
    queries: Tensor
    keys: Tensor


def fewer_dimensions(
    queries: Tensor, keys: Tensor, fixed: Tensor, pairs: Sequence[int], count: int
) -> Dimensions:
    """The `count` dimensions of a head with the least expected squared error of its scores.

    A query and a key are taken to be of tokens that know nothing of each other. A dimension of the
    best approximation of the product of what is not rotated then adds the square of its singular
    value. What a rotated pair adds is averaged over all angles between the two: half of the product
    of the pair's squared norms, and nothing together with another pair. So a pair stays as it is,
    or goes. Where there are both, as many of each stay as together add most. Among equals the first
    stay.

    Args:
        queries: float64 [d, d], second moments of q, summed over the queries of the head.
        keys: float64 [d, d], of k without its bias.
        fixed: float64 [d, d], of the keys' bias.
        pairs: as `Width.pairs`.
        count: r, even where there are pairs.
    """
    partners = pairs or range(len(queries))
    free = [one for one, other in enumerate(partners) if one == other]
    squares = queries.diagonal(), (keys + fixed).diagonal()
    adds = {
        (one, other): float((squares[0][[one, other]].sum() * squares[1][[one, other]].sum()) / 2)
        for one, other in enumerate(partners)
        if one < other
    }
    best = sorted(adds, key=lambda pair: -adds[pair])
    left, right, strengths = joint_transforms(queries[free][:, free], keys[free][:, free])
    squared = strengths.square().tolist()
    most, least = min(len(best), count // 2), max(0, count - len(free) + 1) // 2
    number = max(
        range(most, least - 1, -1),
        key=lambda n: sum(adds[pair] for pair in best[:n]) + sum(squared[: count - 2 * n]),
    )
    rest = count - 2 * number
    places = sorted([*(place for pair in best[:number] for place in pair), *free[:rest]])
    of_queries, of_keys = torch.eye(len(queries), dtype=torch.float64)[places].repeat(2, 1, 1)
    if rest < len(free):
        new = torch.tensor([places.index(place) for place in free[:rest]], dtype=torch.int64)
        of_queries[new[:, None], free] = left[:rest]
        of_keys[new[:, None], free] = right[:rest]
    return Dimensions(tuple(places), of_queries, of_keys)


def joint_transforms(queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(P [d, d], R [d, d], strengths [d]) float64: the first r rows of P and R are the best.

    With q = A x and k = B y over inputs of second moment 1, `queries` is A A^T and `keys` B B^T.
    The error of (P_r A)^T (R_r B) is the Frobenius norm of what it and A^T B differ by, and is that
    of the singular values of A^T B, `strengths`, from r on. Both sides have the same size: what the
    root of a singular value leaves of each. R^T P of all rows is the identity. Nothing larger than
    d x d is factorized, because A^T B = U^T (L^T M) V with orthonormal rows U and V, where L and M
    are roots of the second moments.

    Args:
        queries: [d, d], positive semidefinite.
        keys: [d, d], positive semidefinite.
    """
    root_of_queries, root_of_keys = _root(queries), _root(keys)
    left, strengths, right = torch.linalg.svd(root_of_queries.T @ root_of_keys)
    usable = strengths > NO_STRENGTH * strengths[:1]
    shrink = torch.where(usable, strengths, 1.0).rsqrt().mul(usable)[:, None]
    return shrink * (right @ root_of_keys.T), shrink * (left.T @ root_of_queries.T), strengths


def _root(moment: Tensor) -> Tensor:
    """L [d, d] with L L^T a second moment."""
    values, vectors = torch.linalg.eigh(moment.add(moment.T).div(2))
    root: Tensor = vectors * values.clamp(min=0.0).sqrt()
    return root
