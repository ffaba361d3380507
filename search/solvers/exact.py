"""The additive model solved exactly: an integer program over (site, option) choices.

A site's choices sum to 1 while its parent keeps and to 0 when it drops, so void sites cost and
lose nothing. Ties in the loss go to the configuration of least cost relative to the limits.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import NDArray

from apportion.errors import ApportionError
from apportion.hashing import content_hash
from apportion.search.problem import TOLERANCE, Config, Floats, Problem

Choices = dict[tuple[int, int], Any]  # (site, option) -> its binary variable

ATTEMPTS = 4  # solves with a limit tightened by what the last answer exceeded it by
LARGEST = 1e4  # coefficients are scaled to this: HiGHS' tolerances are absolute


@dataclass(frozen=True)
class Infeasibility:
    """Why no configuration meets all limits.

    Attributes:
        minimum: kind -> the least total that its limit alone would have to allow.
        factor: the least t such that all limits times t can be met at once.
        config: a configuration that meets them.
    """

    minimum: Mapping[str, float]
    factor: float
    config: Config


class Exact:
    """Solves integer programs over one problem and keeps the answers.

    Every answer is in `answers` (JSON) under a hash of its question before it is returned, so
    that a replay does not solve again.
    """

    def __init__(self, problem: Problem, answers: dict[str, Any]) -> None:
        """Takes the answers of an earlier run, which are added to in place."""
        self.problem = problem
        self.answers = answers
        digest = blake2b(digest_size=16)
        for array in (*problem.cost.values(), problem.drops, problem.parent, problem.count):
            digest.update(np.ascontiguousarray(array).tobytes())
        self._problem_hash = digest.hexdigest()

    def solve(
        self,
        table: Floats,
        limits: Mapping[str, float] | None = None,
        avoid: Sequence[Config] = (),
        distance: int = 1,
        gap: float = 0.0,
    ) -> Config | None:
        """The configuration of least summed `table` [sites, options] within `limits`.

        Args:
            table: inf bars an option.
            limits: the problem's own where absent.
            avoid: canonical configurations from which at least `distance` sites must differ.
            gap: relative distance to the optimum that will do; above 0 ties are left as found.

        Returns:
            The canonical configuration, None where there is none.
        """
        limits = dict(self.problem.limit if limits is None else limits)
        question = [
            blake2b(np.ascontiguousarray(table).tobytes(), digest_size=16).hexdigest(),
            {"base": {k: self.problem.base.get(k, 0.0) for k in limits}, "limits": limits},
            [list(config) for config in avoid],
            [distance, gap],
        ]
        key = "exact:" + content_hash([self._problem_hash, *question])
        if key not in self.answers:
            config = self._solve(table, limits, (avoid, distance), gap)
            self.answers[key] = None if config is None else list(config)
        answer = self.answers[key]
        return None if answer is None else tuple(answer)

    def _solve(
        self,
        table: Floats,
        limits: dict[str, float],
        away: tuple[Sequence[Config], int],
        gap: float,
    ) -> Config | None:
        program = _Program(self.problem, table, gap, away)
        first = self._within(program, table, limits, None)
        if first is None or gap > 0:
            return first
        relative = sum(self.problem.scaled_cost.values(), np.zeros_like(table))
        best = self.problem.summed(table, first)
        cheaper = self._within(program, relative, limits, best)
        if cheaper is None or self.problem.summed(table, cheaper) > best + TOLERANCE * abs(best):
            return first
        return min(first, cheaper, key=lambda c: (self.problem.summed(relative, c), c))

    def _within(
        self, program: "_Program", goal: Floats, limits: dict[str, float], loss: float | None
    ) -> Config | None:
        """Solves, sums the costs anew, and tightens a limit that the answer only just breaks."""
        bounds = {kind: limit + TOLERANCE * abs(limit) for kind, limit in limits.items()}
        tight = dict(bounds)
        for _ in range(ATTEMPTS):
            config = program.solve(goal, tight, loss)
            if config is None:
                return None
            excess = {k: self.problem.total(k, config) - bound for k, bound in bounds.items()}
            if all(value <= 0 for value in excess.values()):
                return config
            for kind, value in excess.items():
                tight[kind] -= 2 * max(value, 0.0)
        return None


class _Program:
    """What all programs over a problem have in common: the tree, and what to keep away from."""

    def __init__(
        self,
        problem: Problem,
        table: Floats,
        gap: float = 0.0,
        away: tuple[Sequence[Config], int] = ((), 1),
    ) -> None:
        self.problem = problem
        self.table = table
        self.gap = gap
        self.away = away
        self.allowed: NDArray[np.bool_] = problem.present & np.isfinite(table)

    def solve(self, goal: Floats, bounds: Mapping[str, float], loss: float | None) -> Config | None:
        """Minimizes `goal` within bounds, and within `loss` of the table where it is given."""
        program, x = self._start()
        program += _weighted(x, goal, _scale(goal))
        for kind, bound in bounds.items():
            cost, scale = self.problem.cost[kind], _scale(self.problem.cost[kind])
            left = bound - self.problem.base.get(kind, 0.0)
            program += _weighted(x, cost, scale) <= left * scale
        if loss is not None:
            scale = _scale(self.table)
            program += _weighted(x, self.table, scale) <= loss * scale * (1 + TOLERANCE)
        return self._answer(program, x)

    def least_factor(self, limits: Mapping[str, float]) -> Config | None:
        """The configuration that meets `limits` times the least factor."""
        program, x = self._start()
        factor = program.add_variable("factor")
        program += factor * LARGEST
        for kind, limit in limits.items():
            scale = LARGEST / abs(limit)
            base = self.problem.base.get(kind, 0.0) * scale
            program += _weighted(x, self.problem.cost[kind], scale) + base <= (
                factor * limit * scale
            )
        return self._answer(program, x)

    def _start(self) -> tuple[Any, Choices]:
        import pulp

        program = pulp.LpProblem("additive", pulp.LpMinimize)
        pairs = [(int(s), int(o)) for s, o in np.argwhere(self.allowed)]
        x = {(s, o): program.add_variable(f"x_{s}_{o}", cat="Binary") for s, o in pairs}
        keeps = self.allowed & ~self.problem.drops
        for site, above in enumerate(self.problem.parent.tolist()):
            chosen = pulp.lpSum(x[site, o] for o in np.flatnonzero(self.allowed[site]).tolist())
            if above < 0:
                program += chosen == 1
            else:
                kept = np.flatnonzero(keeps[above]).tolist()
                program += chosen == pulp.lpSum(x[above, o] for o in kept)
        configs, distance = self.away
        for config in configs:
            # Of the sites that it decides, so many must be decided anew, or be void.
            sites = np.flatnonzero(~self.problem.void(config)).tolist()
            same = [x[s, config[s]] for s in sites if (s, config[s]) in x]
            program += pulp.lpSum(same) <= len(sites) - distance
        return program, x

    def _answer(self, program: Any, x: Choices) -> Config | None:
        import pulp

        tolerances = dict(mip_feasibility_tolerance=1e-9, primal_feasibility_tolerance=1e-9)
        status = program.solve(
            pulp.HiGHS(
                msg=False, gapRel=self.gap, gapAbs=0.0, threads=1, random_seed=0, **tolerances
            )
        )
        if status == pulp.LpStatusInfeasible:
            return None
        if status != pulp.LpStatusOptimal:
            raise ApportionError(f"HiGHS ended with {pulp.LpStatus[status]}")
        config = self.problem.neutral.copy()
        for (site, option), variable in x.items():
            if variable.varValue > 0.5:
                config[site] = option
        return self.problem.canonical(tuple(config.tolist()))


def infeasibility(problem: Problem) -> Infeasibility | None:
    """The report on limits that no configuration meets; None where one does.

    Limits must be positive.
    """
    free = _Program(problem, np.zeros_like(problem.loss))
    config = free.least_factor(problem.limit) if problem.limit else problem.neutral_config
    if config is None:
        raise ApportionError("some site has no option that may be chosen")
    if problem.feasible(config):
        return None
    minimum = {}
    for kind in problem.limit:
        cheapest = free.solve(problem.cost[kind], {}, None)
        minimum[kind] = problem.total(kind, cheapest or config)
    factor = max(problem.total(kind, config) / limit for kind, limit in problem.limit.items())
    return Infeasibility(minimum, factor, config)


def _weighted(x: Choices, values: Floats, scale: float) -> Any:
    import pulp

    return pulp.lpSum(float(values[at]) * scale * variable for at, variable in x.items())


def _scale(values: Floats) -> float:
    finite = np.abs(values[np.isfinite(values)])
    return LARGEST / (float(finite.max(initial=0.0)) or 1.0)
