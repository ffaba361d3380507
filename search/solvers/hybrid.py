"""The default: exact answers of the additive model, refined and corrected by real evaluations.

The loss table feeds the integer program; its answers are measured; what whole configurations
lose corrects the table; the program is solved again on the corrected table and on draws from its
posterior, and mutations of the best configuration that the table favours join them. A batch is
raced: all on a part of the full slice, another for each batch, the best few on the whole of it.
"""

from typing import Any

from apportion.search.ledger import Ledger, Measuring
from apportion.search.memory import Memory, applied, differences
from apportion.search.moves import mutate
from apportion.search.problem import Config, Floats, Problem
from apportion.search.solver import Proposal, SearchSlice, Strategy
from apportion.search.solvers.evolutionary import start
from apportion.search.solvers.exact import Exact
from apportion.search.solvers.frontier import Frontier
from apportion.search.solvers.ladder import GAP, Rung, climb, diverse, rungs
from apportion.search.solvers.score import PILOT, score
from apportion.search.solvers.uniform import short_slice, uniform
from apportion.search.surrogate import Surrogate, observations

BASELINES = 0.2  # of all tokens, at most, for the uniform configurations
FRONT = 0.2  # of the tokens left then, for points of the front away from the limits
NEAR = 2  # diverse near-optima in the first batch
DRAWN = 3  # programs on drawn tables in a batch
MUTANTS = 200  # mutations that the table is asked about, per batch
FINALISTS = 1  # of a batch that go on to the full slice
NOTHING = 1e-6  # a loss up to it is rounding
IDLE = 5  # batches with nothing new, before the search ends


class Hybrid:
    """The parts of solver "hybrid" over one ledger."""

    def __init__(self, ledger: Ledger, problem: Problem, exact: Exact, memory: Memory) -> None:
        """`problem` may still lack its loss table."""
        self.ledger = ledger
        self.problem = problem
        self.exact = exact
        self.memory = memory
        self.short = short_slice(ledger.settings)
        self.batch = ledger.settings.offspring
        self.rungs: list[Rung] = []
        self.climbed = 0

    def strategy(self) -> Strategy:
        """Table, baselines, exact answers, half of the front, search, the other half.

        Where the neutral configuration is within the limits and loses nothing, as of a divergence,
        nothing is left to search for but the front.
        """
        ledger, full = self.ledger, self.ledger.settings.full
        neutral = self.problem.neutral_config
        if self.problem.feasible(neutral):
            yield from ledger.measure([Proposal(neutral, full, "hybrid:neutral")])
            if abs(ledger.mean(neutral)) <= NOTHING:
                yield from self._whole_front()
                return
        self.problem = yield from score(ledger, self.problem)
        self.exact.problem = self.problem
        optimum = self.exact.solve(self.problem.additive)
        if optimum is not None:
            yield from ledger.measure([Proposal(optimum, full, "ilp")])
        yield from uniform(ledger, self.problem, BASELINES)
        reserve = int(FRONT * (ledger.settings.tokens - ledger.spent))
        self.rungs = list(rungs(self.problem))
        if optimum is not None:
            near = diverse(self.exact, self.problem.additive, NEAR, [optimum])
            yield from ledger.measure([Proposal(c, full, "ilp:near") for c in near])
        yield from self._front(ledger.spent + reserve // 2)
        if start(ledger, self.problem) is not None:
            yield from self._search(ledger.settings.tokens - (reserve - reserve // 2))
        yield from self._front(ledger.settings.tokens)

    def _whole_front(self) -> Strategy:
        """Table, baselines, the table again where it matters, and points of the front."""
        ledger = self.ledger
        self.problem = yield from score(ledger, self.problem, share=PILOT)
        self.exact.problem = self.problem
        yield from uniform(ledger, self.problem, BASELINES)
        frontier = Frontier(ledger, self.problem, self.exact, self.memory)
        yield from frontier.search(ledger.settings.tokens)

    def _front(self, until: int) -> Measuring:
        full, ledger = self.ledger.settings.full, self.ledger
        while ledger.spent + ledger.price(full.windows) <= until:
            step, self.climbed = self.memory.recall(f"hybrid:front:{self.climbed}", self._climb)
            if not step:
                return
            yield from ledger.measure([Proposal(tuple(c), full, n) for n, c in step], until)

    def _climb(self) -> tuple[list[tuple[str, Config]], int]:
        """The next rung that can be solved, and how many are climbed then."""
        left = iter(self.rungs[self.climbed :])
        step = climb(self.exact, self._corrected().mean_table(), left, 1)
        return step, len(self.rungs) - len(list(left))

    def _corrected(self) -> Surrogate:
        """The table as corrected by all that was measured so far."""
        seen = observations(self.ledger, self.ledger.best())
        return Surrogate(self.problem, seen)

    def _search(self, until: int) -> Measuring:
        ledger, full = self.ledger, self.ledger.settings.full
        number = idle = 0
        while ledger.spent + ledger.price(full.windows) <= until and idle < IDLE:
            before, number = ledger.spent, number + 1
            candidates = self._candidates(number)
            # The table knows the first windows too well: a race on them favours its own errors.
            last = full.windows - self.short.windows
            part = SearchSlice(int(self.memory.rng.integers(last + 1)), self.short.windows)
            wanted = [Proposal(c, part, origin) for c, origin in candidates.items()]
            if len(candidates) > FINALISTS:
                yield from ledger.measure(wanted, until - ledger.price(full.windows))
            order = sorted(candidates, key=lambda c: ledger.mean(c, part))
            finalists = [Proposal(c, full, candidates[c]) for c in order[:FINALISTS]]
            yield from ledger.measure(finalists, until)
            idle = idle + 1 if ledger.spent == before else 0

    def _candidates(self, number: int) -> dict[Config, str]:
        """New feasible configurations with their origins: exact answers, then mutations."""

        def compute() -> list[Any]:
            found = self._proposed(number)
            first = next(iter(found), ())
            return [first, list(found.values()), differences(first, list(found))]

        first, origins, found = self.memory.recall(f"hybrid:batch{number}", compute)
        configs = [applied(first, difference) for difference in found]
        return dict(zip(configs, origins, strict=True))

    def _proposed(self, number: int) -> dict[Config, str]:
        model, found, rng = self._corrected(), dict[Config, str](), self.memory.rng
        tables = [model.mean_table(), *(model.sampled_table(rng) for _ in range(DRAWN))]
        for draw, table in enumerate(tables):
            config = self.exact.solve(table, gap=GAP)
            if config is not None and not self._seen(config):
                found.setdefault(config, f"hybrid:b{number}:ilp{draw}")
        for config in self._mutants(tables[0], self.batch - len(found)):
            found.setdefault(config, f"hybrid:b{number}:mutant")
        return found

    def _mutants(self, table: Floats, count: int) -> list[Config]:
        parent = start(self.ledger, self.problem)
        drawn = dict[Config, float]()
        if parent is None:
            return []
        for _ in range(MUTANTS):
            child = mutate(self.problem, parent, self.memory.rng)
            if child is not None and not self._seen(child):
                drawn.setdefault(child, self.problem.summed(table, child))
        return sorted(drawn, key=drawn.__getitem__)[:count]

    def _seen(self, config: Config) -> bool:
        return self.ledger.tried(config)
