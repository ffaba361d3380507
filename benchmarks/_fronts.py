"""Fronts of KL, bytes and latency: what they dominate, and how one stands against another."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from apportion.search.pareto import front
from apportion.search.problem import Floats
from apportion.studies.database.rows import Evaluation
from apportion.studies.stages.confirm import difference

LEAST_KL = 1e-4  # nats: a perplexity that is higher by a 10,000th; what loses less is all alike
SAME = 1 + 1e-9  # costs are sums of floats


@dataclass(frozen=True, eq=False)
class Point:
    """A configuration on held-out data.

    Attributes:
        origin: what proposed it.
        kl: on held-out data, in nats.
        bytes, latency: over dense.
    """

    origin: str
    kl: float
    bytes: float
    latency: float
    evaluation: Evaluation

    @property
    def criteria(self) -> tuple[float, float, float]:
        """What volumes are made of; all are better when lower."""
        return math.log10(max(self.kl, LEAST_KL)), self.bytes, self.latency


def non_dominated(points: Iterable[Point]) -> list[Point]:
    """The points that no other beats in every respect."""
    known = list(points)
    on = front(criteria(known))
    return [point for point, stays in zip(known, on.tolist(), strict=True) if stays]


def criteria(points: Sequence[Point]) -> Floats:
    """[points, 3]"""
    return np.array([point.criteria for point in points]).reshape(-1, 3)


def volume(points: Sequence[Point], reference_kl: float) -> float:
    """What the points dominate up to the reference KL and the dense model, in decades of KL."""
    return hypervolume(criteria(points), np.array([math.log10(reference_kl), 1.0, 1.0]))


def hypervolume(points: Floats, reference: Floats) -> float:
    """Volume between the points and the reference, exactly.

    By slicing (HSO; While, Hingston, Barone and Huband, 2006): in a slice of the last criterion,
    the points that have begun by then dominate the same in all other criteria.

    Args:
        points: [points, criteria], lower is better. What is not below the reference in every
            criterion, or not finite, adds nothing.
        reference: [criteria].
    """
    inside = points[(points < reference).all(axis=1) & np.isfinite(points).all(axis=1)]
    if not len(inside):
        return 0.0
    if len(reference) == 1:
        return float(reference[0] - inside.min())
    ordered = inside[np.argsort(inside[:, -1])]
    depths = np.diff(np.append(ordered[:, -1], reference[-1]))
    slices = [
        float(depth) * hypervolume(ordered[:count, :-1], reference[:-1])
        for count, depth in enumerate(depths, 1)
        if depth > 0
    ]
    return sum(slices)


def excess(one: Point, other: Point, documents: Any) -> float:
    """Paired standard errors by which one's KL is above the other's; below 0 where it is better.

    It is 0 where neither is above `LEAST_KL`.

    Args:
        documents: [windows] of which document a held-out window is; None: not known.
    """
    found = difference(one.evaluation, other.evaluation, documents)
    if found.mean == 0 or max(one.kl, other.kl) <= LEAST_KL:
        return 0.0
    return found.mean / found.error if found.error > 0 else math.copysign(math.inf, found.mean)


def within(points: Iterable[Point], most_bytes: float, most_latency: float) -> list[Point]:
    """The points that keep both limits."""
    return [p for p in points if p.bytes <= most_bytes * SAME and p.latency <= most_latency * SAME]


def least_excess(point: Point, joint: Sequence[Point], documents: Any) -> float:
    """`excess` of the best joint point that is neither larger nor slower; inf: there is none."""
    rivals = within(joint, point.bytes, point.latency)
    return min((excess(rival, point, documents) for rival in rivals), default=math.inf)


def inside(points: Iterable[Point], reference_kl: float) -> list[Point]:
    """The points that are not worse than the reference in any respect."""
    return [point for point in within(points, 1.0, 1.0) if point.kl <= reference_kl]
