"""Problems with known losses: what a test may build, and how it drives a solver."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest

from apportion.search.problem import Config, Floats, Problem
from apportion.search.solver import Proposal, Result, Settings, Solver

SUB_BLOCKS = 2
WEIGHT_SITES = 2


@dataclass
class Synthetic:
    """Each choice moves an output vector; the loss of a window is a squared length.

    The quadratic's cross terms are interactions: choices that push the same way lose more
    together than alone, opposite ones less.
    """

    problem: Problem
    moves: Floats  # [sites, options, dimensions]
    windows: Floats  # [windows, dimensions]
    fails: Callable[[Config], bool] = field(default=lambda config: False)

    def result(self, proposal: Proposal) -> Result:
        """The result of one proposal; its loss is exactly additive over windows."""
        if self.fails(proposal.config):
            return Result(None, None, "not finite")
        part = slice(proposal.slice.first, proposal.slice.stop)
        losses = (self.windows[part] * self.moved(proposal.config)) ** 2
        return Result(losses.sum(axis=1), np.ones(len(losses)))

    def moved(self, config: Config) -> Floats:
        """[dimensions] the sum of all moves that are not void."""
        active = ~self.problem.void(config)
        return self.moves[np.arange(self.problem.sites), np.asarray(config)][active].sum(axis=0)

    def loss(self, config: Config) -> float:
        """The loss over infinitely many windows, whose second moment is 1."""
        return float((self.moved(config) ** 2).sum())


def nested_problem(
    blocks: int, options: int, limits: dict[str, float], rng: np.random.Generator
) -> Problem:
    """Blocks of two sub-blocks of two weight sites; limits are shares of the neutral totals."""
    per_block = 1 + SUB_BLOCKS * (1 + WEIGHT_SITES)
    sites = blocks * per_block
    parent = np.full(sites, -1)
    structure = np.zeros(sites, dtype=bool)
    for block in range(blocks):
        top = block * per_block
        structure[top] = True
        for sub in range(top + 1, top + per_block, 1 + WEIGHT_SITES):
            structure[sub], parent[sub], parent[sub + 1 : sub + 1 + WEIGHT_SITES] = True, top, sub
    count = np.where(structure, 2, options)
    drops = structure[:, None] & (np.arange(options) == 1)
    padding = np.arange(options) >= count[:, None]
    ratio = np.concatenate([[1.0], np.sort(rng.uniform(0.1, 0.8, options - 1))[::-1]])
    cost = {}
    for kind in limits:
        size = rng.integers(1, 9, (sites, 1)) * 1e4
        noise = rng.uniform(0.8, 1.2, (sites, options)) if kind == "latency" else 1.0
        cost[kind] = np.where(structure[:, None], 0.0, size * ratio * noise).round()
        cost[kind][padding] = np.inf
    neutral = np.zeros(sites, dtype=np.int64)
    base = dict.fromkeys(cost, 5e4)
    loss = np.where(padding, np.inf, np.nan)
    uniform = {f"o{o}": tuple(0 if s else o for s in structure.tolist()) for o in range(1, options)}
    total = {kind: base[kind] + cost[kind][:, 0].sum() for kind in cost}
    limit = {kind: share * total[kind] for kind, share in limits.items()}
    return Problem(loss, cost, base, limit, parent, neutral, drops, count, uniform)


def synthetic(
    seed: int,
    blocks: int = 3,
    options: int = 5,
    dimensions: int = 64,
    windows: int = 64,
    limits: dict[str, float] | None = None,
) -> Synthetic:
    """A nested problem whose options lose the more the less they cost, unevenly over sites."""
    rng = np.random.default_rng(seed)
    limits = {"bytes": 0.45, "latency": 0.6} if limits is None else limits
    problem = nested_problem(blocks, options, limits, rng)
    size = np.exp(rng.normal(0, 1, (problem.sites, 1))) * 0.002
    severity = (np.arange(options) / (options - 1)) ** 3 * np.exp(
        rng.normal(0, 0.5, (problem.sites, options))
    )
    severity[:, 0] = 0.0
    structure = problem.drops.any(axis=1)
    severity[structure] *= 0.0
    severity[structure, 1] = np.where(problem.parent[structure] < 0, 40.0, 15.0)
    direction = rng.normal(0, 1, (problem.sites, options, dimensions)) / np.sqrt(dimensions)
    moves = np.sqrt(size * severity)[:, :, None] * direction
    weather = np.exp(rng.normal(0, 0.5, (windows, 1)))
    scales = rng.normal(0, 1, (windows, dimensions)) * weather / np.sqrt(np.exp(0.5))
    return Synthetic(problem, moves, scales)


def drive(
    solver: Solver, world: Synthetic, asks: int | None = None
) -> list[tuple[Proposal, Result]]:
    """Asks and tells until the solver is done, or so many times; everything in order."""
    log = []
    while (asks is None or asks > 0) and (proposals := solver.ask()):
        results = [world.result(proposal) for proposal in proposals]
        solver.tell(results)
        log += zip(proposals, results, strict=True)
        asks = None if asks is None else asks - 1
    return log


def winner(world: Synthetic, log: list[tuple[Proposal, Result]], settings: Settings) -> Config:
    """The feasible configuration of least loss among those scored on the full slice."""
    full = [(r.mean, p.config) for p, r in log if p.slice == settings.full]
    return min(one for one in full if world.problem.feasible(one[1]))[1]


@pytest.fixture(name="synthetic")
def synthetic_fixture() -> Callable[..., Synthetic]:
    """The function of that name."""
    return synthetic


@pytest.fixture(name="drive")
def drive_fixture() -> Callable[..., list[tuple[Proposal, Result]]]:
    """The function of that name."""
    return drive


@pytest.fixture(name="winner")
def winner_fixture() -> Callable[..., Config]:
    """The function of that name."""
    return winner
