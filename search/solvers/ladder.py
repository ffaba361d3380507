"""Integer-program answers as incumbents: at the limits, near them, and along the front."""

from collections.abc import Iterator, Mapping

from apportion.search.ledger import Ledger
from apportion.search.problem import Config, Floats, Problem
from apportion.search.solver import Proposal, Strategy
from apportion.search.solvers.exact import Exact
from apportion.search.solvers.score import score
from apportion.search.solvers.uniform import uniform

Rung = tuple[str, Mapping[str, float]]

LOOSEST, TIGHTEST = 4.0, 0.6  # factors on the limits
RUNGS = 16
GAP = 1e-3  # the additive model is further from the truth than that
DIVERSE = 6  # near-optima at the true limits


def targets(problem: Problem) -> dict[str, float]:
    """The limits, or every kind's neutral total where nothing is limited."""
    if problem.limit:
        return dict(problem.limit)
    return {kind: problem.total(kind, problem.neutral_config) for kind in problem.cost}


def rungs(problem: Problem) -> Iterator[Rung]:
    """(name, limits), coarse steps first: all limits scaled together, then each kind alone."""
    goal = targets(problem)
    dense = {kind: problem.total(kind, problem.neutral_config) for kind in goal}
    loosest = max((dense[k] / goal[k] for k in goal if goal[k] > 0), default=1.0)
    high = min(LOOSEST, max(1.0, loosest)) if problem.limit else 1.0
    low = TIGHTEST if problem.limit else TIGHTEST / LOOSEST
    kinds = [tuple(goal)] + [(kind,) for kind in goal if len(goal) > 1]
    factors = [low * (high / low) ** fraction for fraction in spread(RUNGS)]
    for names in kinds:
        for factor in factors:
            label = (
                f"ilp:{factor:.2f}" if len(names) == len(goal) else f"ilp:{names[0]}:{factor:.2f}"
            )
            yield label, {kind: goal[kind] * factor for kind in names}


def spread(count: int) -> list[float]:
    """The fractions i / count, 0 and 1 included, those of the coarsest grids first."""
    grid = sorted(range(count + 1), key=lambda i: (-(i & -i) if i else -count, i))
    return [i / count for i in grid]


def diverse(
    exact: Exact, table: Floats, count: int, avoid: list[Config], gap: float = GAP
) -> Iterator[Config]:
    """Near-optima at the true limits, each a 10th of the sites away from all before."""
    distance = max(1, len(table) // 10)
    found = list(avoid)
    for _ in range(count):
        config = exact.solve(table, avoid=found, distance=distance, gap=gap)
        if config is None:
            return
        found.append(config)
        yield config


def climb(
    exact: Exact, table: Floats, rung: Iterator[Rung], count: int
) -> list[tuple[str, Config]]:
    """The next `count` feasible rungs, solved on `table`."""
    found: list[tuple[str, Config]] = []
    for name, limits in rung:
        config = exact.solve(table, limits, gap=GAP)
        if config is not None:
            found.append((name, config))
        if len(found) == count:
            break
    return found


def ilp_strategy(ledger: Ledger, problem: Problem, exact: Exact) -> Strategy:
    """Solver "ilp": the optimum of the additive model, near-optima, and the front's ladder."""
    problem = yield from score(ledger, problem)
    exact.problem = problem
    full = ledger.settings.full
    optimum = exact.solve(problem.additive)
    if optimum is not None:
        yield from ledger.measure([Proposal(optimum, full, "ilp")])
    yield from uniform(ledger, problem, share=0.25)
    if optimum is not None:
        near = diverse(exact, problem.additive, DIVERSE, [optimum])
        yield from ledger.measure([Proposal(c, full, "ilp:near") for c in near])
    rung = rungs(problem)
    while ledger.affords(full.windows) and (step := climb(exact, problem.additive, rung, 8)):
        yield from ledger.measure([Proposal(c, full, name) for name, c in step])
