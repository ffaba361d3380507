"""The arrays that a solver works on. No solver ever sees a model."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from apportion.errors import ApportionError

Config = tuple[int, ...]
Floats = NDArray[np.float64]

TOLERANCE = 1e-9


@dataclass(frozen=True, eq=False)
class Problem:
    """Sites, their options, and what each choice costs and loses.

    Attributes:
        loss: [sites, options] what an option adds to the loss when it is chosen alone; nan: not
            measured, inf: padding, or an option that failed. It may be negative.
        cost: kind -> [sites, options] in the kind's unit; inf: padding. Not assumed monotone.
        base: kind -> what no site holds. A kind that is absent has 0.
        limit: kind -> upper bound of `total`; kinds without a limit are absent.
        parent: [sites] index of the site above, -1: none.
        neutral: [sites] the option that changes nothing (`dense`, `keep`); a void site holds it.
        drops: [sites, options] whether choosing it voids all sites below.
        removes: [sites, options] whether it leaves nothing of the site, or a constant in its
            place; None: all that void do.
        count: [sites] number of real options; those behind it are padding.
        uniform: option text -> that option everywhere it is taken, no drops.
        start: (origin, configuration) that every solver scores before all else, in this order.
    """

    loss: Floats
    cost: Mapping[str, Floats]
    base: Mapping[str, float]
    limit: Mapping[str, float]
    parent: NDArray[np.int64]
    neutral: NDArray[np.int64]
    drops: NDArray[np.bool_]
    count: NDArray[np.int64]
    uniform: Mapping[str, Config]
    removes: NDArray[np.bool_] | None = None
    start: tuple[tuple[str, Config], ...] = ()

    @property
    def sites(self) -> int:
        """Number of sites."""
        return int(self.loss.shape[0])

    @cached_property
    def levels(self) -> list[NDArray[np.int64]]:
        """The sites by depth, roots first. Raises ApportionError where parents form a cycle."""
        depth = np.where(self.parent < 0, 0, -1)
        levels = [np.flatnonzero(depth == 0)]
        while (left := np.flatnonzero(depth < 0)).size:
            below = left[depth[self.parent[left]] == len(levels) - 1]
            if not below.size:
                raise ApportionError(f"the parents of sites {left.tolist()} form a cycle")
            depth[below] = len(levels)
            levels.append(below)
        return levels

    @cached_property
    def _rows(self) -> NDArray[np.int64]:
        return np.arange(self.sites)

    @cached_property
    def present(self) -> NDArray[np.bool_]:
        """[sites, options] what may be chosen: no padding, finite costs, not known to fail."""
        present = np.arange(self.loss.shape[1]) < self.count[:, None]
        for cost in self.cost.values():
            present &= np.isfinite(cost)
        return present & ~np.isposinf(self.loss)

    @cached_property
    def additive(self) -> Floats:
        """[sites, options] the loss table as additive models use it.

        A negative one-option loss is mostly noise and would be counted as a gift in every
        combination, so it is clipped to 0. What was not measured or cannot be chosen is inf.
        """
        usable = self.present & np.isfinite(self.loss)
        table = np.where(usable, np.maximum(np.nan_to_num(self.loss), 0.0), np.inf)
        table[np.arange(self.sites), self.neutral] = 0.0
        return table

    @cached_property
    def scaled_cost(self) -> dict[str, Floats]:
        """Costs relative to their limits; where nothing is limited, to all sites neutral."""
        if self.limit:
            return {kind: self.cost[kind] / abs(limit or 1.0) for kind, limit in self.limit.items()}
        dense = {kind: self.total(kind, self.neutral_config) for kind in self.cost}
        return {kind: cost / (abs(dense[kind]) or 1.0) for kind, cost in self.cost.items()}

    @cached_property
    def neutral_config(self) -> Config:
        """Nothing is changed anywhere."""
        return tuple(int(option) for option in self.neutral)

    def void(self, config: Config) -> NDArray[np.bool_]:
        """[sites] whether a site above drops, so that this one no longer exists."""
        if len(self.levels) == 1:
            return np.zeros(self.sites, dtype=np.bool_)
        dropped = self.drops[self._rows, np.asarray(config, dtype=np.int64)]
        void = np.zeros(self.sites, dtype=np.bool_)
        for level in self.levels[1:]:
            above = self.parent[level]
            void[level] = void[above] | dropped[above]
        return void

    def canonical(self, config: Config) -> Config:
        """The configuration with `neutral` at every void site."""
        if len(self.levels) == 1:
            return tuple(np.asarray(config).tolist())
        return tuple(np.where(self.void(config), self.neutral, config).tolist())

    def total(self, kind: str, config: Config) -> float:
        """Base and the cost of all sites that are not void, in the unit of `kind`."""
        return self.base.get(kind, 0.0) + self.summed(self.cost[kind], config)

    def feasible(self, config: Config) -> bool:
        """Whether every limit holds, within 1e-9 of the limit."""
        return all(
            self.total(kind, config) <= limit + TOLERANCE * abs(limit)
            for kind, limit in self.limit.items()
        )

    def additive_loss(self, config: Config) -> float:
        """The loss that the one-option losses predict; inf where one of them is unknown."""
        return self.summed(self.additive, config)

    def change(self, values: Floats, config: Config) -> Floats:
        """What every single switch would add to the sum of `values` [sites, options].

        `config` is canonical. Dropping a site takes away all below it, keeping it again brings
        them back neutral. Void sites and options that may not be chosen are inf.
        """
        rows, chosen = self._rows, np.asarray(config, dtype=np.int64)
        void, dropped = self.void(config), self.drops[rows, chosen]
        held, fresh = values[rows, chosen].copy(), values[rows, self.neutral].copy()
        held[void] = 0.0
        below, restored = np.zeros(self.sites), np.zeros(self.sites)
        for level in reversed(self.levels[1:]):
            np.add.at(below, self.parent[level], held[level] + below[level])
            np.add.at(restored, self.parent[level], fresh[level] + restored[level])
        now = held + np.where(dropped, 0.0, below)
        kept = np.where(dropped, restored, below)
        then = values + np.where(self.drops, 0.0, kept[:, None])
        allowed = self.present & ~void[:, None]
        return np.subtract(then, now[:, None], out=np.full_like(then, np.inf), where=allowed)

    def summed(self, values: Floats, config: Config) -> float:
        """The sum of `values` [sites, options] over the sites that are not void."""
        chosen = values[self._rows, np.asarray(config, dtype=np.int64)]
        return float(chosen[~self.void(config)].sum())
