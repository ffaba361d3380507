"""The configurations that the user brings, scored before anything else."""

from apportion.search.ledger import Ledger, Measuring
from apportion.search.solver import Proposal, Strategy


def begun(ledger: Ledger, strategy: Strategy) -> Strategy:
    """The strategy, behind the start configurations of the ledger's problem.

    What it asks for is then known, and is not asked for again.
    """
    yield from starting(ledger)
    yield from strategy


def starting(ledger: Ledger) -> Measuring:
    """Proposes each start configuration once on the full slice, as far as the tokens reach.

    A uniform one keeps the origin of a uniform one: it is a baseline, whoever brings it.
    """
    problem, full = ledger.problem, ledger.settings.full
    uniform = {problem.canonical(c): f"uniform:{name}" for name, c in problem.uniform.items()}
    wanted = [(problem.canonical(config), origin) for origin, config in problem.start]
    yield from ledger.measure([Proposal(c, full, uniform.get(c, origin)) for c, origin in wanted])
