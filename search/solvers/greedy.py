"""Down from the neutral configuration by the best trade of loss against excess, then swaps."""

import numpy as np

from apportion.search.ledger import Ledger
from apportion.search.moves import LEAST, relief, slack, switched, switches
from apportion.search.problem import Config, Problem
from apportion.search.solver import Proposal, Strategy
from apportion.search.solvers.score import score
from apportion.search.solvers.uniform import uniform

POINTS = 8  # configurations of the way down that are proposed for the front
CONSIDERED = 256  # switches on each side of a swap


def descend(problem: Problem) -> list[Config]:
    """The way from neutral to the first feasible configuration, or to where no switch helps.

    Each step is the switch of least loss per relief (see `moves.relief`); one that loses nothing
    comes before all others.
    """
    config = problem.neutral_config
    path = [config]
    while not problem.limit or not problem.feasible(config):
        gain, loss = relief(problem, config), problem.change(problem.additive, config)
        helps = (gain > LEAST) & np.isfinite(loss)
        if not helps.any():
            return path
        rate = np.full_like(loss, np.inf)
        rate[helps] = np.where(loss[helps] > 0, loss[helps] / gain[helps], loss[helps])
        site, option = np.unravel_index(int(np.argmin(rate)), rate.shape)
        config = switched(problem, config, int(site), int(option))
        path.append(config)
    return path


def improve(problem: Problem, config: Config) -> Config:
    """Takes the best single switch or swap of two sites on the additive model while one helps."""
    while True:
        better = _best_step(problem, config)
        if better is None:
            return config
        config = better


def _best_step(problem: Problem, config: Config) -> Config | None:
    loss = problem.change(problem.additive, config)
    change, left = switches(problem, config), slack(problem, config)
    allowed = np.argwhere(np.isfinite(loss))
    gains = loss[allowed[:, 0], allowed[:, 1]]
    costs = change[:, allowed[:, 0], allowed[:, 1]]
    up = np.argsort(gains, kind="stable")[:CONSIDERED]
    up = up[gains[up] < -LEAST]
    down = np.argsort(np.abs(gains), kind="stable")
    down = down[(costs[:, down] < 0).any(axis=0)][:CONSIDERED]
    best = -LEAST
    step: tuple[int, ...] | None = None
    for first in up:
        if (costs[:, first] <= left).all() and gains[first] < best:
            best, step = float(gains[first]), (int(first),)
        both = gains[first] + gains[down]
        fits = (costs[:, first, None] + costs[:, down] <= left[:, None]).all(axis=0)
        fits &= allowed[down, 0] != allowed[first, 0]
        for second in down[fits & (both < best)]:
            pair = gains[first] + gains[second]
            if pair < best and not _related(problem, allowed[first, 0], allowed[second, 0]):
                best, step = float(pair), (int(first), int(second))
    if step is None:
        return None
    for index in step:
        config = switched(problem, config, int(allowed[index, 0]), int(allowed[index, 1]))
    return config


def _related(problem: Problem, one: int, other: int) -> bool:
    """Whether one site is above the other, so that their switches do not add up."""
    for low, high in ((one, other), (other, one)):
        above = int(problem.parent[low])
        while above >= 0:
            if above == high:
                return True
            above = int(problem.parent[above])
    return False


def greedy_strategy(ledger: Ledger, problem: Problem) -> Strategy:
    """Solver "greedy": the improved end of the way down, then points along the way."""
    problem = yield from score(ledger, problem)
    yield from uniform(ledger, problem)
    path = descend(problem)
    full = ledger.settings.full
    if problem.feasible(path[-1]):
        yield from ledger.measure([Proposal(improve(problem, path[-1]), full, "greedy")])
    along = np.unique(np.linspace(len(path) - 1, 0, POINTS).astype(int))[::-1]
    yield from ledger.measure([Proposal(path[i], full, "greedy:path") for i in along])
