"""Configurations to measure whole, spread from the fastest to the slowest prediction."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from apportion.cost_models.table import Drops, Rows

Config = tuple[int, ...]

POOL = 4000
SHARPEST = 30.0


@dataclass(frozen=True)
class Shape:
    """What a space is to arithmetic: option counts [sites], parents, and which options drop."""

    count: NDArray[np.int64]
    parent: NDArray[np.int64]
    drops: Drops

    def canonical(self, config: Sequence[int]) -> Config:
        """What lies under a dropped site holds its neutral option, 0."""
        void = self.void(config)
        return tuple(0 if void[place] else int(option) for place, option in enumerate(config))

    def void(self, config: Sequence[int]) -> NDArray[np.bool_]:
        """[sites]: lies under a dropped site. Parents stand before their children."""
        void = np.zeros(len(self.count), dtype=bool)
        for place, above in enumerate(self.parent):
            if above >= 0:
                void[place] = void[above] or self.drops[above, config[above]]
        return void

    def total(self, rows: Rows, config: Sequence[int]) -> float:
        """The sum of the rows of all sites that are not void."""
        taken = rows[np.arange(len(rows)), list(config)]
        return float(taken[~self.void(config)].sum())


def stratified(
    rows: Rows,
    shape: Shape,
    alike: NDArray[np.int64],
    count: int,
    generator: np.random.Generator,
    given: Sequence[Config],
) -> list[Config]:
    """Distinct configurations: the given ones, the extremes, and mixes from even strata of cost.

    Args:
        rows: predicted costs [sites, options].
        shape: the space.
        alike: the first option of the site that runs the same [sites, options]; configurations
            that differ only among such are one.
        count: how many, the given ones included; fewer where the space has fewer.
        generator: of the mixes.
        given: configurations that must be there.
    """

    def reduced(config: Config) -> Config:
        return shape.canonical(alike[np.arange(len(alike)), list(config)].tolist())

    chosen = list(dict.fromkeys(map(reduced, given)))
    pool = [reduced(config) for config in _extremes(rows, shape)]
    pool += [reduced(_mix(rows, shape, generator)) for _ in range(POOL)]
    pool = [config for config in dict.fromkeys(pool) if config not in set(chosen)]
    wanted = max(0, min(count - len(chosen), len(pool)))
    totals = np.array([shape.total(rows, config) for config in pool])
    return chosen + [pool[place] for place in _one_of_each_stratum(totals, wanted, generator)]


def _one_of_each_stratum(
    totals: NDArray[np.float64], wanted: int, generator: np.random.Generator
) -> list[int]:
    """Places of `wanted` totals: the nearest to a random point of each of as many even strata."""
    if not wanted:
        return []
    edges = np.linspace(totals.min(), totals.max(), wanted + 1)
    points = generator.uniform(edges[:-1], edges[1:])
    points[0], points[-1] = totals.min(), totals.max()
    free = np.ones(len(totals), dtype=bool)
    places = []
    for point in points:
        place = int(np.argmin(np.where(free, np.abs(totals - point), np.inf)))
        free[place] = False
        places.append(place)
    return places


def _extremes(rows: Rows, shape: Shape) -> list[Config]:
    """The fastest with and without drops, and the slowest."""
    keeping = np.where(shape.drops, np.inf, rows)
    slowest = np.where(np.isfinite(keeping), keeping, -np.inf)
    fastest = np.where(shape.drops, -np.inf, rows)
    return [tuple(map(int, each)) for each in (fastest.argmin(1), keeping.argmin(1),
                                               slowest.argmax(1))]  # fmt: skip


def _mix(rows: Rows, shape: Shape, generator: np.random.Generator) -> Config:
    """One random configuration: some of the options, leaning to the fast or the slow ones."""
    width = rows.shape[1]
    allowed = generator.random(width) < generator.choice([0.15, 0.4, 1.0])
    leaning = generator.choice([-1, 1]) * SHARPEST ** generator.uniform(-1, 1)
    dropping = generator.choice([0.0, 1.0]) * generator.random() ** 2
    finite = np.where(np.isfinite(rows), rows, 0.0)
    typical = finite.sum(1, keepdims=True) / shape.count[:, None] + 1e-12
    wishes = -leaning * finite / typical + generator.gumbel(size=rows.shape)
    wishes[:, ~allowed] -= 1e6
    wishes[~np.isfinite(rows) | shape.drops] = -np.inf
    config = wishes.argmax(1)
    dropped = generator.random(len(rows)) < dropping
    can_drop = shape.drops.any(1)
    voiding = shape.drops.argmax(1)
    if shape.drops.sum(1).max(initial=0) > 1:
        liked = np.where(shape.drops, generator.random(rows.shape), -1.0)
        voiding = liked.argmax(1)
    config = np.where(dropped & can_drop, voiding, config)
    return tuple(map(int, config))
