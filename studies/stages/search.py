"""Search: the solver proposes, the pool evaluates, the store keeps; the winner is fixed at its end.

A resumed search feeds a fresh solver the stored results again: its proposals must be the stored
trials, in their order, so a changed solver, seed or problem is noticed instead of mixed in.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from apportion.errors import ApportionError, InvalidInput
from apportion.search.pareto import front as pareto_front
from apportion.search.problem import Config, Problem
from apportion.search.solver import Proposal, Result, SearchSlice, Settings
from apportion.search.solvers import make_solver
from apportion.search.solvers.exact import infeasibility
from apportion.studies.database.rows import Evaluation, NewTrial, TrialRow
from apportion.studies.evaluations import Naming, Runner
from apportion.studies.limits import amount
from apportion.studies.pricing import Prices
from apportion.workers.pool import Evaluate

PART: Final = "search"
Record = Callable[[list[NewTrial], dict[str, Any]], Sequence[int]]


@dataclass(frozen=True)
class Candidate:
    """A trial that was scored on the full search slice.

    Attributes:
        loss: mean search loss; never reported as the loss of what is exported.
        feasible: within all limits of the solver.
    """

    number: int
    config: Config
    loss: float
    costs: dict[str, float]
    origin: str
    feasible: bool


@dataclass(frozen=True)
class Progressed:
    """Where a search stands: `best` is the least full-slice loss within limits, None: none yet.

    `is_new`: the trials were not stored before. `reused`: so many of them were evaluated already,
    by earlier studies.
    """

    tokens: int
    evaluations: int
    best: float | None
    is_new: bool
    reused: int


@dataclass
class Search:
    """One round of the search over one problem."""

    prices: Prices
    problem: Problem
    settings: Settings
    solver: str
    naming: Naming
    runner: Runner
    record: Record

    def run(
        self,
        stored: Sequence[TrialRow],
        state: dict[str, Any] | None,
        found: list[Candidate],
    ) -> Iterator[Progressed]:
        """Search to the end of the budget, from the stored trials on; yields after each batch.

        Args:
            stored: this round's trials, in order.
            state: what the solver had computed when the last of them was stored.
            found: takes the configurations that were scored on the full slice.

        Raises:
            InvalidInput: no configuration meets the limits.
            ApportionError: the solver no longer proposes what is stored.
            Stopped: the user asked to stop.
        """
        check_limits(self.problem, {})
        solver = make_solver(self.solver, self.problem, self.settings, state)
        done = tokens = 0
        best: float | None = None
        while proposals := solver.ask():
            trials = [self.trial(proposal) for proposal in proposals]
            known = stored[done : done + len(trials)]
            if known:
                self._compare(trials, known)
                numbers: Sequence[int] = [row.number for row in known]
            else:
                numbers = self.record(trials, solver.state())
            keys = [trial.evaluation_key for trial in trials]
            reused = 0 if known else self.runner.stored(keys)
            results = self._evaluate(trials)
            for number, proposal, result in zip(numbers, proposals, results, strict=True):
                tokens += proposal.slice.windows * self.settings.window_tokens
                candidate = self._candidate(number, proposal, result)
                if candidate is not None:
                    found.append(candidate)
                    if candidate.feasible and (best is None or candidate.loss < best):
                        best = candidate.loss
            done += len(trials)
            solver.tell(results)
            yield Progressed(tokens, done, best, is_new=not known, reused=reused)

    def trial(self, proposal: Proposal) -> NewTrial:
        """A proposal as it is stored."""
        configuration = self.prices.space.configuration(proposal.config)
        first, windows = proposal.slice.first, proposal.slice.windows
        return NewTrial(
            configuration=configuration,
            first_window=first,
            windows=windows,
            part=PART,
            origin=proposal.origin,
            vector=proposal.vector,
            costs=self.prices.costs(proposal.config),
            evaluation_key=self.naming.key(configuration, PART, first, windows),
        )

    def _compare(self, trials: Sequence[NewTrial], stored: Sequence[TrialRow]) -> None:
        """Refuse to go on where the stored path is not the one that is proposed now."""
        for trial, row in zip(trials, stored, strict=True):
            same = (row.configuration, row.first_window, row.windows, row.origin) == (
                trial.configuration,
                trial.first_window,
                trial.windows,
                trial.origin,
            )
            if not same or row.evaluation_key != trial.evaluation_key:
                raise ApportionError(
                    f"trial {row.number} ({row.origin}) is not what this version proposes "
                    f"({trial.origin}): the code, torch or the machine has changed since; submit "
                    "it under another name, what is still valid is reused"
                )

    def _evaluate(self, trials: Sequence[NewTrial]) -> list[Result]:
        work = [
            (t.evaluation_key, Evaluate(dict(t.configuration), PART, t.first_window, t.windows))
            for t in trials
        ]
        done = dict(self.runner.run(work))
        return [_result(done[trial.evaluation_key]) for trial in trials]

    def _candidate(self, number: int, proposal: Proposal, result: Result) -> Candidate | None:
        if proposal.slice != SearchSlice(0, self.settings.windows) or not np.isfinite(result.mean):
            return None
        return Candidate(
            number=number,
            config=proposal.config,
            loss=result.mean,
            costs=self.prices.costs(proposal.config),
            origin=proposal.origin,
            feasible=self.problem.feasible(proposal.config),
        )


def check_limits(problem: Problem, stated: Mapping[str, float]) -> None:
    """Refuse limits that no configuration meets.

    Args:
        problem: its limits hold what predictions may be wrong by.
        stated: kind -> the limit as the study file means it.

    Raises:
        InvalidInput: with the least values.
    """
    found = infeasibility(problem)
    if found is None:
        return
    alone = {kind: least for kind, least in found.minimum.items() if least > problem.limit[kind]}
    parts = []
    for kind, least in (alone or found.minimum).items():
        bound = amount(kind, problem.limit[kind])
        limit = amount(kind, stated[kind]) if kind in stated else bound
        margin = "" if limit == bound else f" ({bound} less the margin of predictions)"
        parts.append(f"{kind} {limit}{margin}, the least of this space is {amount(kind, least)}")
    together = "" if alone else f"; not at once: all limits x {found.factor:.3f} can be met"
    raise InvalidInput(f"limits cannot be met: {'; '.join(parts)}{together}")


def _result(evaluation: Evaluation) -> Result:
    return Result(evaluation.losses, evaluation.weights, evaluation.failure)


def front(candidates: Sequence[Candidate], kinds: Sequence[str]) -> list[Candidate]:
    """The non-dominated in search loss and the limited costs, by falling first cost."""
    if not candidates:
        return []
    points = np.asarray([[c.loss, *(c.costs[kind] for kind in kinds)] for c in candidates])
    on = pareto_front(points)
    chosen = [c for c, keep in zip(candidates, on, strict=True) if keep]
    return sorted(chosen, key=lambda c: (-c.costs[kinds[0]], c.loss))


def winner(candidates: Sequence[Candidate]) -> Candidate:
    """The least search loss among the feasible; the earliest trial of equals.

    Raises:
        ApportionError: every feasible configuration failed.
    """
    feasible = [c for c in candidates if c.feasible]
    if not feasible:
        raise ApportionError("no configuration within the limits could be evaluated")
    return min(feasible, key=lambda c: (c.loss, c.number))


def best_rival(
    candidates: Sequence[Candidate], of: Candidate, kinds: Sequence[str]
) -> Candidate | None:
    """The uniform configuration of least search loss whose every limited cost is <= `of`'s."""
    rivals = [
        c
        for c in candidates
        if c.origin.startswith("uniform:")
        and c.config != of.config
        and all(c.costs[kind] <= of.costs[kind] * (1 + 1e-9) for kind in kinds)
    ]
    return min(rivals, key=lambda c: (c.loss, c.number), default=None)
