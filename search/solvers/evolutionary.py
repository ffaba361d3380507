"""EvoPress' search (arXiv 2410.14649), for several linear limits and nested sites.

A (1 + lambda) evolution: few flips, no crossover, selection in stages on fresh slices of growing
length, the parent against its children in the last. Published for one budget and swaps that keep
it; flips with repair in place of the swaps are ours, and so is the start from the best feasible
uniform configuration, or one that the user brings.
"""

import numpy as np

from apportion.search.ledger import Ledger, Measuring
from apportion.search.memory import Memory, applied, differences
from apportion.search.moves import mutate, repair
from apportion.search.problem import Config, Problem
from apportion.search.solver import Proposal, SearchSlice, Settings, Strategy
from apportion.search.solvers.uniform import uniform

CHECKED = 4  # generations between two scorings of the parent on the full slice
DRAWS = 20  # per child, before a generation goes on with fewer
IDLE = 20  # generations that asked for nothing new, before the search ends


def offspring(
    problem: Problem, parent: Config, count: int, rng: np.random.Generator
) -> list[Config]:
    """Up to `count` different feasible children, no copies of the parent."""
    children: dict[Config, None] = {}
    for _ in range(DRAWS * count):
        if len(children) == count:
            break
        child = mutate(problem, parent, rng)
        if child is not None and child != parent:
            children[child] = None
    return list(children)


def stages(settings: Settings) -> list[tuple[int, int]]:
    """(survivors, windows) of each stage."""
    windows = [min(w, settings.windows) for w in settings.stage_windows]
    return list(zip(settings.survivors, windows, strict=True))


def generation_windows(settings: Settings) -> int:
    """The most windows that one generation asks for, the parent in the last stage included."""
    total, candidates = 0, settings.offspring
    for survivors, windows in stages(settings):
        total += candidates * windows
        candidates = survivors
    return total + stages(settings)[-1][1]


def start(ledger: Ledger, problem: Problem) -> Config | None:
    """The best feasible configuration known, or neutral repaired."""
    known = ledger.best()
    return known if known is not None else repair(problem, problem.neutral_config)


def evopress_strategy(ledger: Ledger, problem: Problem, memory: Memory) -> Strategy:
    """Solver "evopress": ends with the first generation that does not fit in the budget."""
    settings, full, rng = ledger.settings, ledger.settings.full, memory.rng
    yield from uniform(ledger, problem, share=0.25, only_feasible=True)
    parent = start(ledger, problem)
    if parent is None:
        return
    generation = idle = 0
    while ledger.affords(generation_windows(settings) + full.windows) and idle < IDLE:
        before, generation = ledger.spent, generation + 1
        candidates = _children(problem, parent, settings.offspring, memory, generation)
        for stage, (survivors, windows) in enumerate(stages(settings), 1):
            if stage == len(settings.survivors):
                candidates = [*candidates, parent]
            part = SearchSlice(int(rng.integers(settings.windows - windows + 1)), windows)
            origin = f"evopress:g{generation}:s{stage}"
            yield from ledger.measure([Proposal(c, part, origin) for c in candidates])
            known = {config: ledger.mean(config, part) for config in candidates}
            candidates = sorted(candidates, key=known.__getitem__)[:survivors]
        parent = candidates[0]
        if generation % CHECKED == 0:
            yield from _check(ledger, parent, generation)
        idle = idle + 1 if ledger.spent == before else 0
    yield from _check(ledger, parent, generation)


def _children(
    problem: Problem, parent: Config, count: int, memory: Memory, generation: int
) -> list[Config]:
    found = memory.recall(
        f"evopress:g{generation}",
        lambda: differences(parent, offspring(problem, parent, count, memory.rng)),
    )
    return [applied(parent, difference) for difference in found]


def _check(ledger: Ledger, parent: Config, generation: int) -> Measuring:
    full = ledger.settings.full
    yield from ledger.measure([Proposal(parent, full, f"evopress:g{generation}:parent")])
