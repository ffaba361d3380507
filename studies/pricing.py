"""What configurations cost, and the problem that a solver is given: arrays, no models."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from apportion.cost_models.table import CostTable, guarded_limit, guarded_rows
from apportion.errors import InvalidInput
from apportion.search.problem import Config, Problem
from apportion.spaces.grammar import parse_option
from apportion.spaces.space import DENSE, Space
from apportion.studies.database.rows import Layout
from apportion.studies.limits import CACHE_BYTES, Limit

Rows = NDArray[np.float64]
WORST = "latency.worst"


def latency_kind(device: str) -> str:
    """The kind of cost that a device's latency is."""
    return f"latency.{device}"


@dataclass(frozen=True)
class Prices:
    """Everything that is known of costs before a configuration is run.

    Attributes:
        space: sites and options, struck ones left out.
        rows: kind -> [sites, options] in the kind's unit; inf where a site has fewer options.
        base: kind -> what no site holds.
        tables: device -> its latency table (the rows of `latency.DEVICE` are its means).
        uniform: option text -> that option everywhere.
    """

    space: Space
    rows: Mapping[str, Rows]
    base: Mapping[str, float]
    tables: Mapping[str, CostTable]
    uniform: Mapping[str, Config]

    @property
    def parent(self) -> NDArray[np.int64]:
        """Place of the structure site around each site, -1: none."""
        return np.asarray(self.space.parent, dtype=np.int64)

    @property
    def drops(self) -> NDArray[np.bool_]:
        """[sites, options] the options that void what lies below a site."""
        return self._marked(self.space.voiding)

    @property
    def removes(self) -> NDArray[np.bool_]:
        """[sites, options] the options that leave nothing of a site, or a constant."""
        return self._marked([[option.drops for option in row] for row in self.space.options])

    def _marked(self, marks: Sequence[Sequence[bool]]) -> NDArray[np.bool_]:
        width = max(map(len, marks))
        marked = np.zeros((len(marks), width), dtype=bool)
        for place, row in enumerate(marks):
            marked[place, : len(row)] = row
        return marked

    def total(self, kind: str, config: Config) -> float:
        """One cost of a configuration, in the kind's unit."""
        return self._totals([kind], config)[kind]

    def _totals(self, kinds: Iterable[str], config: Config) -> dict[str, float]:
        there = np.flatnonzero(~np.asarray(self.space.voids(config)))
        options = np.asarray(config, dtype=np.int64)[there]
        # one after the other: the last bits of a sum depend on its order
        held = {kind: sum(self.rows[kind][there, options].tolist()) for kind in kinds}
        return {kind: float(self.base[kind] + value) for kind, value in held.items()}

    @cached_property
    def _dense(self) -> dict[str, float]:
        kinds = [latency_kind(device) for device in self.tables]
        return self._totals(kinds, (0,) * len(self.space.sites))

    def costs(self, config: Config) -> dict[str, float]:
        """Every cost of a configuration; `latency.worst` is over latency / dense latency."""
        found = self._totals(self.rows, config)
        if self.tables:
            found[WORST] = max(found[kind] / dense for kind, dense in self._dense.items())
        return found

    @cached_property
    def layout(self) -> Layout:
        """How trials of this space are stored."""
        sites = zip(self.space.names, self.space.texts, strict=True)
        neutral = (0,) * len(self.space.sites)
        return Layout(dict(sites), tuple(self.costs(neutral)))

    def unit(self, option: str) -> Config:
        """The uniform configuration that a limit is measured in.

        Options that differ by their method alone are stored and run alike (but for awq's scales),
        so "w4g64" stands for the first of them where it is no option itself.

        Raises:
            InvalidInput: the space has no such option.
        """
        if option == DENSE:
            return (0,) * len(self.space.sites)
        if option in self.uniform:
            return self.uniform[option]
        like = (text for text in self.uniform if parse_option(text).without_methods == option)
        if (found := next(like, None)) is None:
            known = ", ".join([DENSE, *self.uniform])
            raise InvalidInput(f'"{option}" is no option of this space; units here: {known}')
        return self.uniform[found]

    def limit_value(self, limit: Limit) -> float:
        """A limit in the unit of its kind. Raises InvalidInput with the key."""
        if limit.kind == CACHE_BYTES and CACHE_BYTES not in self.rows:
            raise InvalidInput(
                f"limits.{CACHE_BYTES}: the space holds no cache; add a [[space]] entry with "
                'sites = "cache:*" and options = ["keep", "k8v8", "k4v4"]'
            )
        if limit.factor is None or limit.unit is None:
            if limit.value is None:
                raise InvalidInput(f"limits.{limit.kind}: no value")
            return limit.value
        try:
            unit = self.unit(limit.unit)
        except InvalidInput as error:
            raise InvalidInput(f"limits.{limit.kind}: {error}") from error
        return limit.factor * self.costs(unit)[limit.kind]

    def problem(self, limits: Iterable[Limit], tightening: Mapping[str, float]) -> Problem:
        """The problem for a solver.

        Args:
            limits: all of them hold.
            tightening: kind -> factor (at most 1) on what is above the base, after a broken limit.
        """
        cost, bound, base = dict(self.rows), {}, dict(self.base)
        for limit in limits:
            for name, kind, rows, value in self._guarded(limit):
                cost[name], base[name] = rows, self.base[kind]
                share = tightening.get(limit.kind, 1.0)
                bound[name] = base[name] + (value - base[name]) * share
        sites, width = self.drops.shape
        loss = np.full((sites, width), np.inf)
        for place, row in enumerate(self.space.texts):
            loss[place, : len(row)] = np.nan
            loss[place, 0] = 0.0
        return Problem(
            loss=loss,
            cost=cost,
            base=base,
            limit=bound,
            parent=self.parent,
            neutral=np.zeros(sites, dtype=np.int64),
            drops=self.drops,
            removes=self.removes,
            count=np.asarray([len(row) for row in self.space.texts], dtype=np.int64),
            uniform=dict(self.uniform),
        )

    def _guarded(self, limit: Limit) -> list[tuple[str, str, Rows, float]]:
        """A limit as (name, kind, rows for the solver, bound): latencies carry their margin."""
        kind, value = limit.kind, self.limit_value(limit)
        if kind == WORST:
            return [self._worst(device, value) for device in self.tables]
        if not kind.startswith("latency."):
            return [(kind, kind, self.rows[kind], value)]
        table = self.tables[kind.removeprefix("latency.")]
        if limit.unit is None:
            return [(kind, kind, table.rows, guarded_limit(value, table.base, table.margin))]
        unit = self.unit(limit.unit)
        held = [
            0.0 if self.space.void(unit, place) else table.rows[place, option]
            for place, option in enumerate(unit)
        ]
        parent = self.space.parent
        rows = guarded_rows(table.rows, np.asarray(held), table.margin, parent, self.drops)
        return [(kind, kind, rows, value)]

    def _worst(self, device: str, share: float) -> tuple[str, str, Rows, float]:
        """`latency.worst` holds on every device on its own, beside that device's own limit."""
        kind, table = latency_kind(device), self.tables[device]
        bound = share * self.total(kind, (0,) * len(self.space.sites))
        limit = guarded_limit(bound, table.base, table.margin)
        return (f"{WORST}@{device}", kind, table.rows, limit)
