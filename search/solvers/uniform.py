"""Uniform configurations: the baselines that everything else has to beat."""

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from apportion.search.ledger import Ledger, Measuring
from apportion.search.problem import Config, Problem
from apportion.search.solver import Proposal, SearchSlice, Settings, Strategy
from apportion.search.solvers.score import score

DROPS = 4  # uniform(o) is also tried with 1..4 sub-blocks dropped
SHORT = 8  # those are scored on an 8th of the full slice first


def sub_blocks(problem: Problem) -> list[tuple[int, int]]:
    """(site, drop option), all of each site that may be dropped and voids no other such site."""
    removes = problem.drops if problem.removes is None else problem.removes
    drops: NDArray[np.bool_] = removes & problem.present
    droppable: NDArray[np.bool_] = np.any(drops, axis=1)
    holds_another = np.zeros(problem.sites, dtype=np.bool_)
    for level in reversed(problem.levels[1:]):
        holds_another[problem.parent[level]] |= droppable[level] | holds_another[level]
    return [(int(s), int(o)) for s, o in np.argwhere(drops & ~holds_another[:, None])]


def drop_variants(problem: Problem, config: Config) -> list[Config]:
    """`config` with the 1..4 sub-blocks of least one-option loss dropped, as far as it is known.

    Each is dropped the way of its least loss.
    """
    known = [(problem.loss[s, o], s, o) for s, o in sub_blocks(problem)]
    best: dict[int, int] = {}
    for _, site, option in sorted(one for one in known if np.isfinite(one[0])):
        best.setdefault(site, option)
    variants = []
    dropped = list(config)
    for site, option in list(best.items())[:DROPS]:
        dropped[site] = option
        variants.append(problem.canonical(tuple(dropped)))
    return variants


def uniform(
    ledger: Ledger, problem: Problem, share: float = 1.0, only_feasible: bool = False
) -> Measuring:
    """Proposes uniform(o) for every o, and for each o its best variant with sub-blocks dropped.

    What may be a rival of a winner comes first, and of that what the loss table likes best: the
    feasible ones, then their variants, then the infeasible. A variant outside the limits is no
    rival and is not proposed.

    Args:
        share: of the whole token budget, what this may spend; one feasible one is always scored.
        only_feasible: leaves out what is outside the limits.
    """
    full = ledger.settings.full
    until = ledger.spent + int(share * ledger.settings.tokens)
    plain = {name: problem.canonical(config) for name, config in problem.uniform.items()}
    order = sorted(plain, key=lambda name: problem.additive_loss(plain[name]))
    within = [name for name in order if problem.feasible(plain[name])]
    wanted = [Proposal(plain[name], full, f"uniform:{name}") for name in within]
    yield from ledger.measure(wanted[:1])
    yield from ledger.measure(wanted, until)
    yield from _with_drops(ledger, problem, {name: plain[name] for name in order}, until)
    if not only_feasible:
        rest = [name for name in order if name not in within]
        wanted = [Proposal(plain[name], full, f"uniform:{name}") for name in rest]
        yield from ledger.measure(wanted, until)


def _with_drops(
    ledger: Ledger, problem: Problem, plain: Mapping[str, Config], until: int
) -> Measuring:
    short = short_slice(ledger.settings)
    variants = {
        name: [(k, c) for k, c in enumerate(drop_variants(problem, config), 1)]
        for name, config in plain.items()
    }
    variants = {n: [v for v in of if problem.feasible(v[1])] for n, of in variants.items()}
    tried = [
        Proposal(config, short, f"uniform:{name}-drop{k}")
        for name, of in variants.items()
        for k, config in of
    ]
    yield from ledger.measure(tried, until)
    best = [
        min((p for p in tried if p.origin.startswith(f"uniform:{name}-drop")), key=_on(ledger))
        for name, of in variants.items()
        if of
    ]
    best = [p for p in sorted(best, key=_on(ledger)) if np.isfinite(_on(ledger)(p))]
    full = ledger.settings.full
    yield from ledger.measure([Proposal(p.config, full, p.origin) for p in best], until)


def _on(ledger: Ledger) -> Callable[[Proposal], float]:
    return lambda proposal: ledger.mean(proposal.config, proposal.slice)


def short_slice(settings: Settings) -> SearchSlice:
    """The first 8th of the full slice, at least one window."""
    return SearchSlice(0, max(1, settings.windows // SHORT))


def uniform_strategy(ledger: Ledger, problem: Problem) -> Strategy:
    """Solver "uniform": the drops are scored first where there is no loss table."""
    drops = [(s, o) for s, o in sub_blocks(problem) if np.isnan(problem.loss[s, o])]
    problem = yield from score(ledger, problem, drops)
    yield from uniform(ledger, problem)
