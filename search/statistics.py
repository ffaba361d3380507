"""Means of losses per weight, their standard errors, and paired differences.

A mean is a ratio, sum(losses) / sum(weights). Its variance is the usual linearization: residuals
`loss - mean x weight`, summed within clusters, G / (G - 1) for G clusters.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from apportion.search.problem import Floats

DOCUMENTS = 20  # with fewer, errors are clustered by window


@dataclass(frozen=True)
class Estimate:
    """A mean or a difference of means, in the unit of the loss.

    Attributes:
        error: standard error; nan where there is a single cluster.
        clusters: how many the error rests on.
        by_document: whether those are documents; otherwise windows.
    """

    mean: float
    error: float
    clusters: int
    by_document: bool


def estimate(losses: Floats, weights: Floats, documents: NDArray[np.int64] | None) -> Estimate:
    """The mean of [windows] loss sums over [windows] weights.

    Args:
        documents: [windows] of which document a window is; None: not known.
    """
    mean, influence = _influence(losses, weights)
    return _estimate(mean, influence, documents)


def paired(
    losses: Floats,
    weights: Floats,
    other_losses: Floats,
    other_weights: Floats,
    documents: NDArray[np.int64] | None = None,
) -> Estimate:
    """The first mean less the other, both over the same [windows]."""
    mean, influence = _influence(losses, weights)
    other, other_influence = _influence(other_losses, other_weights)
    return _estimate(mean - other, influence - other_influence, documents)


def _influence(losses: Floats, weights: Floats) -> tuple[float, Floats]:
    total = weights.sum()
    mean = float(losses.sum() / total)
    return mean, (losses - mean * weights) / total


def _estimate(mean: float, influence: Floats, documents: NDArray[np.int64] | None) -> Estimate:
    of = np.arange(len(influence))
    by_document = documents is not None and len(np.unique(documents)) >= DOCUMENTS
    if documents is not None and by_document:
        of = np.unique(documents, return_inverse=True)[1]
    sums = np.bincount(of, weights=influence)
    count = len(sums)
    factor = count / (count - 1) if count > 1 else float("nan")
    return Estimate(mean, float(np.sqrt(factor * (sums**2).sum())), count, by_document)
