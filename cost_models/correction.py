"""From a sum of operators to a whole model: class factors, their error and the margin.

Rows are grouped in classes, one for each implementation and one for structure. The predicted
milliseconds of a configuration are a0 base + the sum over classes c of factor[c] x (its rows of
class c). a0 is not free: the dense configuration, the reference of all measurements, is exact.
Factors are drawn towards 1, no correction, by as much as leave-one-out errors ask for: a raw refit
on few measurements is worse than none.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

STRENGTHS = (0.001, 0.01, 0.03, 0.1, 0.3, 1.0, 10.0)
"""What pulls factors to 1, in squared relative errors per squared deviation from 1."""
LEAST_CONFIGURATIONS = 20
MARGIN_BEFORE = 0.10
CONFIDENCE = 0.9


@dataclass(frozen=True)
class Observations:
    """Measured configurations, of one request item.

    Attributes:
        parts: uncorrected milliseconds by class [configurations, classes].
        measured: milliseconds of the whole model [configurations].
        dense_parts: the dense configuration's parts [classes].
        dense: the dense model's milliseconds.
        anchors: the first so many configurations are always fitted and never judged.
    """

    parts: Floats
    measured: Floats
    dense_parts: Floats
    dense: float
    anchors: int = 0

    def without(self, place: int) -> "Observations":
        """All but one configuration."""
        parts, measured = np.delete(self.parts, place, 0), np.delete(self.measured, place)
        return Observations(parts, measured, self.dense_parts, self.dense, self.anchors)

    @property
    def judged(self) -> range:
        """Places of the configurations that errors are taken of."""
        return range(self.anchors, len(self.measured))


def fit(seen: Observations, strength: float) -> Floats:
    """Factors [classes]: ridge towards 1 on relative errors, never negative."""
    weights = 1 / seen.measured
    design = (seen.parts - seen.dense_parts) * weights[:, None]
    target = (seen.measured - seen.dense) * weights - design.sum(axis=1)
    gram = design.T @ design + strength * np.eye(design.shape[1])
    solved: Floats = np.linalg.solve(gram, design.T @ target)
    return np.maximum(1 + solved, 0)


def predict(seen: Observations, factors: Floats, parts: Floats) -> Floats:
    """Milliseconds of configurations with the given parts [n, classes]."""
    predicted: Floats = seen.dense + (parts - seen.dense_parts) @ factors
    return predicted


def corrected(seen: Observations) -> Floats:
    """Factors at the strength of least leave-one-out error; all 1 where there is too little."""
    if len(seen.judged) < 2:
        return np.ones(len(seen.dense_parts))
    errors = [
        float(np.square(_left_out(seen, strength) / seen.measured[seen.judged] - 1).sum())
        for strength in STRENGTHS
    ]
    return fit(seen, STRENGTHS[int(np.argmin(errors))])


def _left_out(seen: Observations, strength: float) -> Floats:
    """Each judged configuration predicted by all others."""
    rest = [seen.without(place) for place in seen.judged]
    return np.array(
        [
            predict(other, fit(other, strength), seen.parts[place])
            for place, other in zip(seen.judged, rest, strict=True)
        ]
    )


def leave_one_out(seen: Observations) -> Floats:
    """Predictions [judged] of a correction, strength included, that never saw the configuration."""
    others = [seen.without(place) for place in seen.judged]
    return np.array(
        [
            predict(other, corrected(other), seen.parts[place])
            for place, other in zip(seen.judged, others, strict=True)
        ]
    )


def margin(measured: Floats, predicted: Floats) -> float:
    """m: the one-sided 90 % conformal quantile of measured / predicted - 1, at least 0.

    The ceil(0.9 (n + 1))-th smallest of n errors exceeds a new one with probability 0.9 or more
    (Vovk and others, 2005). 10 % before there are 20 configurations.
    """
    if len(measured) < LEAST_CONFIGURATIONS:
        return MARGIN_BEFORE
    rank = math.ceil(CONFIDENCE * (len(measured) + 1))
    errors = np.sort(measured / predicted - 1)
    return max(0.0, float(errors[min(rank, len(errors)) - 1]))


def mean_error(measured: Floats, predicted: Floats) -> float:
    """Mean absolute relative error."""
    return float(np.mean(np.abs(predicted / measured - 1))) if len(measured) else math.nan
