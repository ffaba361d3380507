"""The whole front, where limits do not bind: the least loss for any limits that may be asked for.

A front is judged by what it offers within limits that nobody has told yet (its attainment,
Fonseca and Fleming, 1996). Limits are drawn over the box in which something can be traded; each is
a question to the integer program on the corrected table, and its worth is by how much its answer
is predicted to lower the log of the least loss within each of the drawn limits, summed over them.
That is hypervolume in log loss by quadrature, for any number of kinds of cost.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.stats import qmc

from apportion.search.ledger import Ledger, Measuring
from apportion.search.memory import Memory
from apportion.search.pareto import front
from apportion.search.problem import TOLERANCE, Config, Floats, Problem
from apportion.search.solver import Proposal
from apportion.search.solvers.exact import Exact
from apportion.search.solvers.ladder import GAP, climb, rungs
from apportion.search.solvers.score import REFINED, refine
from apportion.search.surrogate import Surrogate, observations

QUESTIONS = 16  # limits that the integer program is asked about, per batch
LEADING = 32  # limits whose answers say which losses are scored on more windows
JUDGES = 10  # 2^n limits that a front is judged by
AT_ONCE = 4  # points in a batch
FIRST = 4  # rungs of the ladder, where there is no front to begin with
IDLE = 5  # batches with nothing new, before the search ends
UNLIMITED = 1 / 3  # share of the drawn limits that leave a kind unlimited
MARGIN = 0.9  # the box reaches below the cheapest known point by that factor
LEAST = 1e-4  # of the largest loss that counts: what is below it is all alike


@dataclass(frozen=True, eq=False)
class Attainment:
    """What a set of points offers within each of many limits.

    Attributes:
        limits: [limits, kinds].
        loss: [limits] the least within them, between `least` and `most`.
        least, most: losses beyond which nothing is gained or lost.
    """

    limits: Floats
    loss: Floats
    least: float
    most: float

    def kept(self, costs: Floats) -> NDArray[np.bool_]:
        """[points, limits] which limits are kept by costs [points, kinds]."""
        bounds = self.limits * (1 + TOLERANCE)
        return np.asarray((costs[:, None, :] <= bounds).all(axis=-1))

    def gains(self, costs: Floats, losses: Floats) -> Floats:
        """[points] nats of log loss that each point alone would add, summed over the limits."""
        clipped = np.clip(losses, self.least, self.most)[:, None]
        lower = np.maximum(np.log(self.loss) - np.log(clipped), 0.0)
        return np.asarray((lower * self.kept(costs)).sum(axis=1))

    def joined(self, costs: Floats, losses: Floats) -> "Attainment":
        """With further points of costs [points, kinds]."""
        clipped = np.clip(losses, self.least, self.most)[:, None]
        offered = np.where(self.kept(costs), clipped, self.most)
        return replace(self, loss=np.minimum(self.loss, offered.min(axis=0, initial=self.most)))


class Frontier:
    """Fills the front of one problem, which has its loss table, over one ledger."""

    def __init__(self, ledger: Ledger, problem: Problem, exact: Exact, memory: Memory) -> None:
        """`exact` solves over the same problem."""
        self.ledger = ledger
        self.problem = problem
        self.exact = exact
        self.memory = memory
        self.kinds = tuple(problem.limit or problem.cost)
        self.begun: list[Config] = []

    def search(self, until: int) -> Measuring:
        """Measures points of the front until so many tokens are spent or nothing new is found.

        What is known when it begins says which costs and losses are of use.
        """
        full, ledger = self.ledger.settings.full, self.ledger
        if not self._front():
            first = climb(self.exact, self.problem.additive, rungs(self.problem), FIRST)
            yield from ledger.measure([Proposal(c, full, name) for name, c in first], until)
        self.begun = self._front()
        if not self.begun:
            return
        table_until = int(REFINED * ledger.settings.tokens)
        self.problem = yield from refine(ledger, self.problem, self._leanings, table_until)
        number = idle = 0
        while ledger.spent + ledger.price(full.windows) <= until and idle < IDLE:
            before, number = ledger.spent, number + 1
            batch = self.memory.recall(f"front:batch{number}", self._batch)
            origin = f"hybrid:front{number}"
            yield from ledger.measure([Proposal(tuple(c), full, origin) for c in batch], until)
            idle = idle + 1 if ledger.spent == before else 0

    def _front(self) -> list[Config]:
        """What nothing that was measured beats, without the neutral configuration."""
        measured = [c for c in self.ledger.complete() if c != self.problem.neutral_config]
        losses = [self.ledger.mean(config) for config in measured]
        stays = front(np.column_stack([self._costs(measured), losses]))
        return [config for config, stay in zip(measured, stays, strict=True) if stay]

    def _leanings(self, problem: Problem) -> list[Config]:
        """What a table answers at a few limits."""
        return self._answers(problem.additive, self._drawn(0)[:LEADING])

    def _batch(self) -> list[Config]:
        """The answers that are predicted to add the most, each to those before it."""
        limits = self._drawn(int(self.memory.rng.integers(2**31)))
        attained = self._attained(limits)
        table = Surrogate(self.problem, observations(self.ledger, None)).mean_table()
        answers = self._answers(table, limits[:QUESTIONS])
        answers = [config for config in answers if not self.ledger.tried(config)]
        costs = self._costs(answers)
        predicted = np.array([self.problem.summed(table, config) for config in answers])
        batch: list[Config] = []
        while answers and len(batch) < AT_ONCE:
            gains = attained.gains(costs, predicted)
            best = int(np.argmax(gains))
            if gains[best] <= 0:
                break
            batch.append(answers[best])
            attained = attained.joined(costs[[best]], predicted[[best]])
        return batch

    def _attained(self, limits: Floats) -> Attainment:
        """What the measured points offer within the limits."""
        measured = self._front()
        losses = np.array([self.ledger.mean(config) for config in measured])
        most = max(self.ledger.mean(config) for config in self.begun)
        nothing = Attainment(limits, np.full(len(limits), most), LEAST * most, most)
        return nothing.joined(self._costs(measured), losses)

    def _answers(self, table: Floats, limits: Floats) -> list[Config]:
        """What the integer program answers within limits [limits, kinds], each answer once."""
        asked = [dict(zip(self.kinds, row.tolist(), strict=True)) for row in limits]
        solved = [self.exact.solve(table, each, gap=GAP) for each in asked]
        return list(dict.fromkeys(config for config in solved if config is not None))

    def _costs(self, configs: Sequence[Config]) -> Floats:
        """[configs, kinds]"""
        totals = [[self.problem.total(kind, c) for kind in self.kinds] for c in configs]
        return np.array(totals).reshape(-1, len(self.kinds))

    def _drawn(self, seed: int) -> Floats:
        """[limits, kinds] evenly over the box in log cost, and some with a kind unlimited.

        Sobol points (scipy.stats.qmc): any first few of them are spread evenly too.
        """
        high = self._costs([self.problem.neutral_config])[0]
        low = np.minimum(self._costs(self.begun).min(axis=0) * MARGIN, high)
        points = qmc.Sobol(len(self.kinds), seed=seed).random_base2(JUDGES)
        shares = np.minimum(points / (1 - UNLIMITED), 1.0)
        return np.asarray(low * (high / low) ** shares)
