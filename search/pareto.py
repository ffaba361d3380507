"""The front: what nothing else beats in every respect."""

import numpy as np
from numpy.typing import NDArray

from apportion.search.problem import Floats


def front(points: Floats) -> NDArray[np.bool_]:
    """[points, criteria], lower is better -> [points] whether a point is on the front.

    A point is dominated by one that is nowhere worse and somewhere better, so equal points stand
    together. A point with a value that is not finite is never on the front.
    """
    on = np.zeros(len(points), dtype=np.bool_)
    candidates = np.flatnonzero(np.isfinite(points).all(axis=1))
    # In lexicographic order nothing is dominated by what comes later.
    order = candidates[np.lexsort(points[candidates].T[::-1])]
    kept = np.empty((0, points.shape[1]))
    for index in order:
        point = points[index]
        dominated = (kept <= point).all(axis=1) & (kept < point).any(axis=1)
        if not dominated.any():
            on[index] = True
            kept = np.vstack([kept, point])
    return on
