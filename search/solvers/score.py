"""The loss table: every option alone, all else neutral."""

from collections.abc import Generator, Iterable, Sequence
from dataclasses import replace

import numpy as np

from apportion.search.ledger import Ledger
from apportion.search.problem import Config, Floats, Problem
from apportion.search.solver import Proposal, Result, SearchSlice, Settings

SHARE = 0.4  # of the token budget, at most, for the whole table


def unscored(problem: Problem) -> list[tuple[int, int]]:
    """The (site, option) pairs that may be chosen, are not neutral, and have no loss yet."""
    wanted = problem.present & np.isnan(problem.loss)
    wanted[np.arange(problem.sites), problem.neutral] = False
    return [(int(s), int(o)) for s, o in zip(*np.nonzero(wanted), strict=True)]


def score_slice(settings: Settings, options: int) -> SearchSlice:
    """The longest slice of 2^n windows with which so many options stay within their share."""
    windows = 1
    price = (options + 1) * settings.window_tokens
    while 2 * windows <= settings.windows and 2 * windows * price <= SHARE * settings.tokens:
        windows *= 2
    return SearchSlice(0, windows)


def one_option(problem: Problem, site: int, option: int) -> Config:
    """Neutral everywhere but at `site`."""
    config = list(problem.neutral_config)
    config[site] = option
    return problem.canonical(tuple(config))


def score(
    ledger: Ledger, problem: Problem, pairs: Sequence[tuple[int, int]] | None = None
) -> Generator[list[Proposal], Sequence[Result], Problem]:
    """Proposes the neutral configuration and each option alone, all on one slice.

    Args:
        pairs: (site, option) to be scored; all that are `unscored` where absent.

    Returns:
        The problem with the losses that were told.
    """
    pairs = unscored(problem) if pairs is None else pairs
    if not pairs:
        return problem
    part = score_slice(ledger.settings, len(pairs))
    configs = [problem.neutral_config, *(one_option(problem, s, o) for s, o in pairs)]
    proposals = [Proposal(config, part, "score") for config in configs]
    yield from ledger.measure(proposals)
    known = [p for p in proposals if ledger.known(p.config, part)]
    scored = [(p, ledger.result(p.config, part)) for p in known]
    return with_loss(problem, loss_table(problem, scored))


def loss_table(problem: Problem, scored: Iterable[tuple[Proposal, Result]]) -> Floats:
    """[sites, options] one-option losses, nan where none was told, inf where it failed.

    Each is the difference to the neutral configuration on the same windows, which is 0 for a
    divergence; where neutral was not scored, it is taken to be 0.
    """
    table = np.full_like(problem.loss, np.nan)
    told = {p.config: (p.slice, r) for p, r in scored if p.origin == "score"}
    table[np.arange(problem.sites), problem.neutral] = 0.0
    neutral = told.get(problem.neutral_config)
    for config, (part, result) in told.items():
        changed = np.flatnonzero(np.asarray(config) != problem.neutral)
        if len(changed) == 1:
            paired = neutral is not None and neutral[0] == part
            zero = neutral[1].mean if neutral is not None and paired else 0.0
            zero = zero if np.isfinite(zero) else 0.0
            table[changed[0], config[changed[0]]] = result.mean - zero
    return table


def with_loss(problem: Problem, losses: Floats) -> Problem:
    """The problem with `losses` [sites, options] where it had none; nan changes nothing."""
    return replace(problem, loss=np.where(np.isnan(losses), problem.loss, losses))
