"""The studies of joint_space.py, one for each space and seed, and what they have found."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from _axes import AXES, EVERYTHING, JOINT
from _cells import losses_mean, reading, recorded_tables, stage_outputs
from _heldout import Index, held_out
from _report import code

from apportion.hashing import content_hash
from apportion.search.ledger import Ledger
from apportion.search.pareto import front
from apportion.search.problem import Floats, Problem
from apportion.search.solver import Result, SearchSlice, Settings
from apportion.search.solvers.exact import Exact
from apportion.search.solvers.ladder import GAP
from apportion.search.solvers.score import paired_loss, scored_windows, with_loss
from apportion.search.surrogate import Surrogate, observations
from apportion.studies.context import Context
from apportion.studies.database.rows import Evaluation, TrialRow
from apportion.studies.database.store import Store
from apportion.studies.home import Home
from apportion.studies.pricing import Prices
from apportion.studies.specification import StudySpec
from apportion.studies.stages import profile

SPACES = AXES | {"joint": JOINT}
SEEDS = (0, 1, 2)
TOKENS = 2_000_000
WINDOWS = 64  # the full search slice
HELDOUT = 8_192  # tokens
LOOSE = {"weight_bytes": "1x dense", "latency.here": "1.25x dense"}
"""The dense model keeps them, with what predictions of latency may be wrong by."""
KINDS = tuple(LOOSE)
REFERENCE = "w2g64:gptq"
Shares = Callable[[Mapping[str, str]], tuple[float, float]]
"""Tells weight_bytes and latency of any configuration, each over dense."""
Judged = tuple["Scored", Evaluation]


def specification(space: str, seed: int, place: Home) -> StudySpec:
    """One study of a space, for its whole front."""
    tables = recorded_tables(place.path / "device.json")
    tokens = tables["data"]["tokens"] | {"heldout": HELDOUT}
    tables |= {
        "data": tables["data"] | {"tokens": tokens},
        "space": EVERYTHING if space == "everything" else SPACES[space],
        "limits": LOOSE,
        "search": {"solver": "hybrid", "tokens": TOKENS, "windows": WINDOWS},
    }
    made_by = content_hash([tables, code("search", "studies")])[:8]
    return StudySpec(**tables | {"study": {"name": f"{space}-{seed}-{made_by}", "seed": seed}})


def prices_of(context: Context) -> Prices:
    """What the recorded device tells of a space, nothing struck."""
    return profile.prices(context, profile.run(context) | {"struck": {}})


def priced(context: Context) -> Shares:
    """Prices of a space that holds all options."""
    prices = prices_of(context)
    dense = prices.costs(prices.unit("dense"))

    def shares(configuration: Mapping[str, str]) -> tuple[float, float]:
        costs = prices.costs(prices.space.config(configuration))
        first, second = (costs[kind] / dense[kind] for kind in KINDS)
        return first, second

    return shares


@dataclass(frozen=True)
class Scored:
    """A configuration with its loss on the full search slice; of an answer it is nan."""

    configuration: Mapping[str, str]
    origin: str
    loss: float


def priced_by(problem: Problem, prices: Prices, union: Prices) -> Problem:
    """The problem of `prices` with what its options cost in a space that holds them all."""
    cost = {kind: problem.cost[kind].copy() for kind in KINDS}
    for place, (name, texts) in enumerate(zip(prices.space.names, prices.space.texts, strict=True)):
        other = union.space.names[name]
        options = [union.space.texts[other].index(text) for text in texts]
        for kind in KINDS:
            cost[kind][place, : len(options)] = union.rows[kind][other, options]
    return replace(problem, cost=cost, base={kind: union.base[kind] for kind in KINDS})


class Finished:
    """A finished study: what it has measured, and what it answers when it is asked for limits.

    Attributes:
        tokens: spent.
        trials: in order, each with its evaluation.
    """

    def __init__(self, spec: StudySpec, place: Home) -> None:
        """Raises SystemExit where it is not finished."""
        store = Store.open(place.database)
        study_id, (_, compressed) = stage_outputs(store, spec.study.name, "report", "compress")
        self.context = reading(spec, place, store)
        self.index: Index = compressed["index"]
        rows = [row for row in store.trials(study_id, 0) if row.part == "search"]
        found = store.evaluations({row.evaluation_key for row in rows})
        self.trials: list[tuple[TrialRow, Evaluation]] = [
            (row, found[row.evaluation_key]) for row in rows
        ]
        self.tokens = sum(row.windows for row in rows) * self.context.window_tokens

    def front(self, most: float) -> list[Scored]:
        """What no other beats on the full slice, of a loss up to `most`, and the reference."""
        full = [
            (Scored(row.configuration, row.origin, losses_mean(evaluation)), row.costs)
            for row, evaluation in self.trials
            if row.windows == WINDOWS
        ]
        known = [(scored, costs) for scored, costs in full if scored.loss <= most]
        criteria = [[scored.loss, *(costs[kind] for kind in KINDS)] for scored, costs in known]
        on = front(np.array(criteria).reshape(-1, 1 + len(KINDS)))
        return [
            scored
            for (scored, _), stays in zip(known, on, strict=True)
            if stays or scored.origin == f"uniform:{REFERENCE}"
        ]

    def reference_loss(self) -> float:
        """On the full search slice, of the reference; its space has to hold it."""
        return next(
            losses_mean(evaluation)
            for row, evaluation in self.trials
            if row.windows == WINDOWS and row.origin == f"uniform:{REFERENCE}"
        )

    def answers(self, asked: Sequence[tuple[float, float]], union: Prices) -> list[Scored]:
        """For limits in shares of dense, what the study's loss table answers.

        Nothing is measured for it. There are up to three answers: of the table alone, as corrected
        by all that was measured, and as corrected for what was measured near the best point known
        within the limits. Limits within which the space has nothing have none.

        Args:
            union: prices of a space that holds all options of this one.
        """
        prices = prices_of(self.context)
        problem = priced_by(prices.problem((), {}), prices, union)
        ledger = self._ledger(prices, problem)
        problem = with_loss(problem, _loss_table(ledger, problem))
        exact, scored = Exact(problem, {}), list[Scored]()
        everywhere = Surrogate(problem, observations(ledger, None)).mean_table()
        for shares in asked:
            limits = {
                kind: share * problem.total(kind, problem.neutral_config)
                for kind, share in zip(KINDS, shares, strict=True)
            }
            within = replace(problem, limit=limits)
            known = [config for config in ledger.complete() if within.feasible(config)]
            near = observations(ledger, min(known, key=ledger.mean, default=None))
            tables = [problem.additive, everywhere, Surrogate(problem, near).mean_table()]
            found = {exact.solve(table, limits, gap=GAP) for table in tables}
            configurations = [prices.space.configuration(c) for c in found if c is not None]
            scored += [Scored(each, "answer", math.nan) for each in configurations]
        return scored

    def _ledger(self, prices: Prices, problem: Problem) -> Ledger:
        """All trials, told again."""
        ledger = Ledger(problem, Settings(0, self.tokens, self.context.window_tokens, WINDOWS))
        for row, evaluation in self.trials:
            part = SearchSlice(row.first_window, row.windows)
            result = Result(evaluation.losses, evaluation.weights, evaluation.failure)
            ledger.record(prices.space.config(row.configuration), part, result)
        return ledger


def judged_front(spec: StudySpec, place: Home, most: float) -> list[Judged]:
    """What a finished study has found, with held-out losses."""
    study = Finished(spec, place)
    return _judged(spec, place, study, study.front(most))


def judged_answers(
    spec: StudySpec, union: StudySpec, place: Home, asked: Sequence[tuple[float, float]]
) -> list[Judged]:
    """What a finished study answers for limits in shares of dense, with held-out losses."""
    study = Finished(spec, place)
    prices = prices_of(reading(union, place, Store.open(place.database)))
    return _judged(spec, place, study, study.answers(asked, prices))


def _judged(spec: StudySpec, place: Home, study: Finished, found: list[Scored]) -> list[Judged]:
    configurations = [scored.configuration for scored in found]
    return list(zip(found, held_out(spec, place, study.index, configurations), strict=True))


def _loss_table(ledger: Ledger, problem: Problem) -> Floats:
    """[sites, options] as far as the options were scored alone; else nan."""
    table = np.full_like(problem.loss, np.nan)
    for site, option in np.argwhere(problem.present).tolist():
        if scored_windows(ledger, problem, site, option):
            table[site, option] = paired_loss(ledger, problem, site, option)
    return table
