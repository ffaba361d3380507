"""Steps between configurations: repair within limits, and random mutation."""

from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray

from apportion.search.problem import TOLERANCE, Config, Floats, Problem

FLIPS = 3  # a mutation flips min(U{1..3}, U{1..3}) sites, as EvoPress does
LEAST = 1e-12  # relief below this is rounding
MILD = 0.5  # share of random steps that go to the next option in cost order


def switches(problem: Problem, config: Config) -> Floats:
    """[kinds, sites, options] what each switch adds to each scaled cost; inf: not allowed."""
    return np.stack([problem.change(cost, config) for cost in problem.scaled_cost.values()])


def slack(problem: Problem, config: Config) -> Floats:
    """[kinds] what is left to each limit, in scaled cost; inf where nothing is limited."""
    if not problem.limit:
        return np.full(len(problem.scaled_cost), np.inf)
    return np.array(
        [
            (limit * (1 + np.sign(limit) * TOLERANCE) - problem.total(kind, config))
            / abs(limit or 1.0)
            for kind, limit in problem.limit.items()
        ]
    )


def relief(problem: Problem, config: Config) -> Floats:
    """[sites, options] by how much each switch lowers the summed relative excess over the limits.

    Where nothing is limited: by how much it lowers the summed scaled cost. -inf: not allowed.
    """
    change = switches(problem, config)
    if not problem.limit:
        return np.asarray(-change.sum(axis=0))
    left = slack(problem, config)
    after = np.maximum(change - left[:, None, None], 0.0).sum(axis=0)
    return np.asarray(np.maximum(-left, 0.0).sum() - after)


def switched(problem: Problem, config: Config, site: int, option: int) -> Config:
    """`config` with another option at `site`, canonical."""
    return problem.canonical((*config[:site], option, *config[site + 1 :]))


def repair(
    problem: Problem,
    config: Config,
    rng: np.random.Generator | None = None,
    frozen: Collection[int] = (),
) -> Config | None:
    """A feasible configuration near `config`; None where single switches do not lead to one.

    Each step lowers the summed relative excess over the limits. At random: any site that can, to
    the mildest such option or to any. Without `rng`: the site of largest cost, the mildest option.
    `frozen` sites are left alone for as long as the others can do it.
    """
    config = problem.canonical(config)
    while not problem.feasible(config):
        gain = relief(problem, config)
        helps = gain > LEAST
        if frozen:
            elsewhere = helps.copy()
            elsewhere[list(frozen)] = False
            helps = elsewhere if elsewhere.any() else helps
        sites = np.flatnonzero(helps.any(axis=1))
        if not sites.size:
            return None
        site = _dearest(problem, config, sites) if rng is None else int(rng.choice(sites))
        options = np.flatnonzero(helps[site])
        order = options[np.argsort(gain[site, options], kind="stable")]
        config = switched(problem, config, site, _step(order, rng))
    return config


def mutate(problem: Problem, config: Config, rng: np.random.Generator) -> Config | None:
    """A feasible neighbour of `config`, or None where the draw led nowhere.

    A few sites are flipped to another option. What a flip spends beyond the limits other sites
    give up; what it saves, another site may spend.
    """
    parent, touched = config, set[int]()
    for _ in range(min(rng.integers(1, FLIPS + 1, size=2))):
        sites = _open(problem, config, touched)
        if not sites.size:
            break
        site = int(rng.choice(sites))
        touched.add(site)
        config = switched(problem, config, site, _other_option(problem, config, site, rng))
        if problem.feasible(config):
            config = _spend(problem, config, touched, rng)
        else:
            repaired = repair(problem, config, rng, touched)
            if repaired is None:
                return None
            config = repaired
    return None if config == parent else config


def _dearest(problem: Problem, config: Config, sites: NDArray[np.int64]) -> int:
    relative = sum(problem.scaled_cost.values(), np.zeros_like(problem.loss))
    return int(sites[np.argmax(relative[sites, np.asarray(config)[sites]])])


def _step(order: NDArray[np.int64], rng: np.random.Generator | None) -> int:
    if rng is None or rng.random() < MILD:
        return int(order[0])
    return int(rng.choice(order))


def _open(problem: Problem, config: Config, touched: Collection[int]) -> NDArray[np.int64]:
    choice = (problem.present.sum(axis=1) > 1) & ~problem.void(config)
    choice[list(touched)] = False
    return np.flatnonzero(choice)


def _other_option(problem: Problem, config: Config, site: int, rng: np.random.Generator) -> int:
    options = np.flatnonzero(problem.present[site])
    if rng.random() < MILD:
        relative = sum(cost[site, options] for cost in problem.scaled_cost.values())
        options = options[np.argsort(relative, kind="stable")]
        at = int(np.flatnonzero(options == config[site])[0]) if config[site] in options else 0
        options = options[max(at - 1, 0) : at + 2]
    return int(rng.choice(options[options != config[site]]))


def _spend(
    problem: Problem, config: Config, touched: Collection[int], rng: np.random.Generator
) -> Config:
    """Raises one other site to a dearer option that fits; nothing where nothing is limited."""
    if not problem.limit:
        return config
    change = switches(problem, config)
    fits = (change <= slack(problem, config)[:, None, None]).all(axis=0)
    fits &= change.sum(axis=0) > 0
    fits[list(touched)] = False
    sites = np.flatnonzero(fits.any(axis=1))
    if not sites.size:
        return config
    site = int(rng.choice(sites))
    options = np.flatnonzero(fits[site])
    order = options[np.argsort(change[:, site, options].sum(axis=0), kind="stable")]
    return switched(problem, config, site, _step(order, rng))
