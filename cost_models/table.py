"""Cost tables: a latency row for every option, the whole model's base, and guarded limits."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.float64]
"""[sites, options]; inf where a site has fewer options."""
Drops = NDArray[np.bool_]
"""[sites, options]; True for the options that void all sites below."""


@dataclass(frozen=True)
class CostTable:
    """Milliseconds of a request: `base` + the rows of all sites that are not void.

    Attributes:
        rows: means [sites, options].
        upper: upper values of the same [sites, options].
        base: what no site holds.
        margin: m, the share by which a whole model's latency exceeds its sum in one of ten cases.
    """

    rows: Rows
    upper: Rows
    base: float
    margin: float


def padded(rows: Sequence[Sequence[float]]) -> Rows:
    """Rows of different lengths as one array, filled up with inf."""
    width = max(map(len, rows), default=0)
    table = np.full((len(rows), width), np.inf)
    for place, row in enumerate(rows):
        table[place, : len(row)] = row
    return table


def guarded_limit(limit: float, base: float, margin: float) -> float:
    """An absolute limit for the solver: what lies above the base is divided by 1 + margin."""
    return base + (limit - base) / (1 + margin)


def guarded_rows(
    rows: Rows, unit: NDArray[np.float64], margin: float, parent: Sequence[int], drops: Drops
) -> Rows:
    """Rows for a limit that is given in units of one uniform configuration.

    Against its own unit an identical operator is exact, so the margin m is charged on what differs:
    d = row - unit's row costs d (1 + m) where it is dearer and saves d / (1 + m) where it is not.
    A void site costs nothing in a solver, so what its saving owes is charged to the drop above.

    Args:
        rows: means [sites, options].
        unit: the unit configuration's row of each site [sites], 0 where it is void there.
        margin: m.
        parent: place of the structure site around each site, -1: none.
        drops: bool [sites, options], the options that void what lies below.

    Returns:
        [sites, options]; their sum over the unit configuration is that of `rows`, exactly.
    """
    difference = rows - unit[:, None]
    guarded: Rows = unit[:, None] + np.where(
        difference > 0, difference * (1 + margin), difference / (1 + margin)
    )
    guarded = np.where(difference == 0, rows, guarded)
    owed = unit * margin / (1 + margin)
    for site in range(len(rows)):
        above = parent[site]
        while above >= 0:
            # An option that the unit itself chose must stay at its own row.
            charged = drops[above] & (difference[above] != 0)
            guarded[above, charged] += owed[site]
            above = parent[above]
    return guarded
