"""The loss table: every option alone, all else neutral."""

from collections import Counter
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import replace

import numpy as np

from apportion.search.ledger import Ledger
from apportion.search.problem import Config, Floats, Problem
from apportion.search.solver import Proposal, Result, SearchSlice, Settings

SHARE = 0.4  # of the token budget, at most, for the whole table
PILOT = 0.2  # the same for the first form of a table that is refined
REFINED = 0.6  # and for all of that: it is asked about limits that nobody has measured at


def unscored(problem: Problem) -> list[tuple[int, int]]:
    """The (site, option) pairs that may be chosen, are not neutral, and have no loss yet."""
    wanted = problem.present & np.isnan(problem.loss)
    wanted[np.arange(problem.sites), problem.neutral] = False
    return [(int(s), int(o)) for s, o in zip(*np.nonzero(wanted), strict=True)]


def score_slice(settings: Settings, options: int, share: float = SHARE) -> SearchSlice:
    """The longest slice of 2^n windows with which so many options stay within their share."""
    windows = 1
    price = (options + 1) * settings.window_tokens
    while 2 * windows <= settings.windows and 2 * windows * price <= share * settings.tokens:
        windows *= 2
    return SearchSlice(0, windows)


def one_option(problem: Problem, site: int, option: int) -> Config:
    """Neutral everywhere but at `site`."""
    config = list(problem.neutral_config)
    config[site] = option
    return problem.canonical(tuple(config))


def score(
    ledger: Ledger,
    problem: Problem,
    pairs: Sequence[tuple[int, int]] | None = None,
    share: float = SHARE,
) -> Generator[list[Proposal], Sequence[Result], Problem]:
    """Proposes the neutral configuration and each option alone, all on one slice.

    Args:
        pairs: (site, option) to be scored; all that are `unscored` where absent.
        share: of the token budget, at most; one window each is always scored.

    Returns:
        The problem with the losses that were told.
    """
    pairs = unscored(problem) if pairs is None else pairs
    if not pairs:
        return problem
    part = score_slice(ledger.settings, len(pairs), share)
    configs = [problem.neutral_config, *(one_option(problem, s, o) for s, o in pairs)]
    proposals = [Proposal(config, part, "score") for config in configs]
    yield from ledger.measure(proposals)
    known = [p for p in proposals if ledger.known(p.config, part)]
    scored = [(p, ledger.result(p.config, part)) for p in known]
    return with_loss(problem, loss_table(problem, scored))


def refine(
    ledger: Ledger, problem: Problem, answers: Callable[[Problem], Iterable[Config]], until: int
) -> Generator[list[Proposal], Sequence[Result], Problem]:
    """Scores what answers stand on with twice as many windows, again and again.

    An answer prefers the options whose losses were told too low. Scoring again what it has chosen
    corrects just those, and spends nothing on options that no answer takes. What was scored on the
    fewest windows comes first, and of that what most answers choose.

    Args:
        problem: it has its loss table.
        answers: the configurations that a table leads to.
        until: a mark of tokens spent in all at which to stop.

    Returns:
        The problem with the refined table.
    """
    while True:
        counts = Counter(pair for config in answers(problem) for pair in chosen(problem, config))
        windows = {pair: scored_windows(ledger, problem, *pair) for pair in counts}
        order = sorted(counts, key=lambda pair: (windows[pair], -counts[pair], pair))
        wanted = list[Proposal]()
        for pair in order:
            if 0 < 2 * windows[pair] < ledger.settings.windows:
                part = SearchSlice(windows[pair], windows[pair])
                alone = one_option(problem, *pair)
                wanted += [Proposal(c, part, "score") for c in (problem.neutral_config, alone)]
        before = ledger.spent
        yield from ledger.measure(wanted, until)
        if ledger.spent == before:
            return problem
        table = np.full_like(problem.loss, np.nan)
        for site, option in counts:
            if windows[site, option]:
                table[site, option] = paired_loss(ledger, problem, site, option)
        problem = with_loss(problem, table)


def chosen(problem: Problem, config: Config) -> list[tuple[int, int]]:
    """The (site, option) pairs of a configuration that are not neutral."""
    return [(s, o) for s, o in enumerate(config) if o != problem.neutral[s]]


def scored_windows(ledger: Ledger, problem: Problem, site: int, option: int) -> int:
    """How many windows, from the first on, one option alone was scored on; of 2^n, at most half."""
    config = one_option(problem, site, option)
    windows = 0
    while (longer := max(1, 2 * windows)) < ledger.settings.windows:
        if not ledger.known(config, SearchSlice(0, longer)):
            break
        windows = longer
    return windows


def paired_loss(ledger: Ledger, problem: Problem, site: int, option: int) -> float:
    """What one option alone adds to the loss on all windows that it was scored on."""
    part = SearchSlice(0, scored_windows(ledger, problem, site, option))
    zero = ledger.mean(problem.neutral_config, part)
    return ledger.mean(one_option(problem, site, option), part) - (zero if np.isfinite(zero) else 0)


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
