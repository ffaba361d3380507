"""Which solver finds the better configuration, and for how many evaluated tokens?

Formula.     A solver's winner is the configuration of least mean KL on the full search slice
             (64 windows of 128 tokens) that keeps the limit of bytes; solvers are compared by the
             difference of their winners' held-out KL, paired over windows. Over the seeds:
             mean of the differences, standard error sqrt(sum of SE^2) / seeds.
             Tokens: windows x 128, summed over all proposals, loss table and baselines included.
Assumptions. The shipped model, and a space of rounded bits, sparsity, rank and drops; a seed draws
             the windows of all three parts of the data and all that a solver draws. evopress as
             published, in its fastest form (16 offspring; survivors 1, 1; 512 and 8,192 tokens;
             2 M in all).
             Nothing is timed: the device is a recording, and latency is not limited.
Ceiling.     No solver beats the best configuration of the space, which is not known; a hybrid
             that is level with evopress at twice its tokens may be at that bound.
Claims.      hybrid, with at most 1 M tokens, is best or within one standard error of the best, and
             has scored its winner before half of the tokens that evopress spends.

Run: .venv/bin/python benchmarks/search_quality.py. Each cell (solver, limit, seed) is a study in
one home: interrupted ones go on, finished ones are not run again, and no configuration is
evaluated twice: a cell's seconds are those that its evaluations took when they were run, whichever
cell ran them.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from _cells import (
    PROCESSES,
    THREADS,
    Row,
    losses_mean,
    processes,
    reading,
    record_device,
    recorded_tables,
    run_cells,
    stage_outputs,
)
from _report import HOME, RESULTS, Claim, at_most, code, table, write

from apportion.cost_models.session import Timing
from apportion.search.statistics import Estimate
from apportion.studies.context import Context
from apportion.studies.database.rows import Evaluation, TrialRow
from apportion.studies.database.store import Store
from apportion.studies.home import Home
from apportion.studies.specification import StudySpec
from apportion.studies.stages.confirm import difference
from apportion.studies.stages.search import Candidate, winner

SOLVERS = ("uniform", "ilp", "evopress", "hybrid")
LIMITS = ("1x w3g64", "0.95x w4g64")
SEEDS = (0, 1, 2)
SPACE = [
    {
        "sites": ["*.self_attn.*", "*.mlp.*"],
        "options": ["dense", "bf16", "w8", "w8a8", "w4g64", "w4", "w3g64", "w3", "w2g64",
                    "w3g64+r8", "s60%", "s50%+w4g64", "s80%+w4", "r50%", "r25%"],
    },
    {"sites": ["attention:*", "mlp:*", "block:*"], "options": ["keep", "drop"]},
]  # fmt: skip
TOKENS = {"uniform": 1_000_000, "ilp": 1_000_000, "evopress": 2_000_000, "hybrid": 1_000_000}
PUBLISHED = {"offspring": 16, "survivors": [1, 1], "stages": [4, 64]}
SHORTEST = Timing(operator_seconds=0.0, model_seconds=0.0)
"""The recording must be there, its figures do not matter."""
COLORS = {"uniform": "#8a8a8a", "ilp": "#c98a1b", "evopress": "#c8442c", "hybrid": "#2a6fb0"}
PLACE = Home.find(HOME / "search_quality")
RECORDING = PLACE.path / "device.json"


@dataclass(frozen=True, order=True)
class Cell:
    """One study."""

    solver: str
    limit: str
    seed: int


CELLS = [Cell(solver, limit, seed) for solver in SOLVERS for limit in LIMITS for seed in SEEDS]


@dataclass(frozen=True)
class Found:
    """What a finished cell came to.

    Attributes:
        row: for the results.
        evaluation: the winner's, on held-out data.
        documents: of which document each held-out window is.
    """

    row: Row
    evaluation: Evaluation
    documents: Any


def specification(cell: Cell) -> StudySpec:
    """The demo's study with another limit, solver and seed, on a recorded device."""
    tables = recorded_tables(RECORDING)
    limit = re.sub(r"[^a-z0-9.]", "", cell.limit)
    name = f"{cell.solver}-{limit}-{cell.seed}-{code('search', 'studies')}"
    sizes: Row = PUBLISHED if cell.solver == "evopress" else {}
    search: Row = {"solver": cell.solver, "tokens": TOKENS[cell.solver]}
    tables |= {
        "study": {"name": name, "seed": cell.seed},
        "space": SPACE,
        "limits": {"weight_bytes": cell.limit},
        "search": search | {"windows": tables["search"]["windows"]} | sizes,
    }
    return StudySpec(**tables)


def found(cell: Cell, name: str, store: Store, context: Context) -> Found:
    """Read a finished cell, the study `name`; `context` is that of any cell of its seed."""
    study_id, (output, compressed) = stage_outputs(store, name, "search", "compress")
    candidates = [Candidate(**value) for value in output["candidates"]]
    chosen = winner(candidates)
    trials = store.trials(study_id, 0)
    samples = context.samples("heldout")
    configuration = trials[chosen.number].configuration
    naming = context.naming(compressed["index"])
    key = naming.key(configuration, "heldout", 0, samples.windows)
    evaluation = store.evaluations([key])[key]
    spent = list(accumulate(t.windows * context.window_tokens for t in trials))
    run = store.evaluations({trial.evaluation_key for trial in trials}, study_id).values()
    row = {
        "solver": cell.solver,
        "limit": cell.limit,
        "seed": cell.seed,
        "tokens": spent[-1],
        "winner_tokens": spent[chosen.number],
        "weight_bytes": chosen.costs["weight_bytes"],
        "loss_search": chosen.loss,
        "loss_heldout": losses_mean(evaluation),
        "origin": chosen.origin,
        "configuration": configuration,
        "evaluation_seconds": sum(each.seconds for each in run),
        "curve": curve(trials, spent, {c.number: c.loss for c in candidates if c.feasible}),
    }
    return Found(row, evaluation, samples.documents)


def curve(
    trials: Sequence[TrialRow], spent: Sequence[int], losses: Mapping[int, float]
) -> list[list[float]]:
    """(tokens, best search loss within the limit) at each improvement, and at the end."""
    points: list[list[float]] = []
    for trial, tokens in zip(trials, spent, strict=True):
        loss = losses.get(trial.number, math.inf)
        if loss < (points[-1][1] if points else math.inf):
            points.append([tokens, loss])
    return [*points, [spent[-1], points[-1][1]]] if points else []


def compared(one: Found, other: Found) -> Estimate:
    """Held-out loss of one winner less the other's."""
    return difference(one.evaluation, other.evaluation, one.documents)


def claims(results: Mapping[Cell, Found]) -> list[Claim]:
    """hybrid against each other solver by limit, its tokens against evopress', and the time."""
    made: list[Claim] = []
    for limit in LIMITS:
        for solver in (s for s in SOLVERS if s != "hybrid"):
            each = [
                compared(results[Cell("hybrid", limit, seed)], results[Cell(solver, limit, seed)])
                for seed in SEEDS
            ]
            mean = sum(e.mean for e in each) / len(each)
            error = math.hypot(*(e.error for e in each)) / len(each)
            name = f"{limit}: held-out KL, hybrid - {solver}, within one SE"
            made.append(at_most(name, mean, "nats", error))
        shares = [
            results[Cell("hybrid", limit, seed)].row["winner_tokens"]
            / results[Cell("evopress", limit, seed)].row["tokens"]
            for seed in SEEDS
        ]
        name = f"{limit}: tokens to hybrid's winner / tokens of evopress, largest of the seeds"
        made.append(at_most(name, max(shares), "x", 0.5))
    seconds = sum(each.row["evaluation_seconds"] for each in results.values())
    name = "evaluations of all cells, two at a time"
    return [*made, at_most(name, seconds / PROCESSES / 60, "minutes", 60)]


def draw(rows: Sequence[Row]) -> None:
    """Best search loss against tokens, a panel for each limit, a line for each seed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    panels = dict(zip(LIMITS, figure.subplots(1, len(LIMITS), squeeze=False)[0], strict=True))
    for row in rows:
        axes, color = panels[row["limit"]], COLORS[row["solver"]]
        tokens, losses = zip(*row["curve"], strict=True)
        label = row["solver"] if row["seed"] == SEEDS[0] else None
        axes.step([t / 1e6 for t in tokens], losses, where="post", color=color, lw=1.3, label=label)
        axes.plot(tokens[-1] / 1e6, losses[-1], "o", color=color, markersize=4)
    for limit, axes in panels.items():
        axes.set_title(f"weight_bytes = {limit}", fontsize=10)
        axes.set_xlabel("evaluated tokens, millions")
        axes.grid(alpha=0.25)
    first = panels[LIMITS[0]]
    first.set_ylabel("best KL within the limit, search slice, nats")
    first.legend(frameon=False, fontsize=8)
    RESULTS.mkdir(exist_ok=True)
    figure.savefig(RESULTS / "search_quality.png", dpi=150)


def told(row: Row) -> list[str]:
    """A row as text."""
    numbers = [f"{row[key]:.5f}" for key in ("loss_search", "loss_heldout")]
    tokens = [f"{row[key] / 1e6:.2f}" for key in ("tokens", "winner_tokens")]
    size, seconds = f"{row['weight_bytes'] / 1e6:.3f}", f"{row['evaluation_seconds']:.0f}"
    return [row["limit"], str(row["seed"]), row["solver"], *tokens, size, *numbers, seconds]


def main() -> None:
    """Run what is missing, then print, draw and write."""
    PLACE.create()
    specs = {cell: specification(cell) for cell in CELLS}
    of_seeds = [specs[Cell(SOLVERS[0], LIMITS[0], seed)] for seed in SEEDS]
    with processes() as pool:
        pool.submit(record_device, of_seeds, PLACE, RECORDING, SHORTEST).result()
        run_cells(pool, list(specs.values()), PLACE)
    store, results = Store.open(PLACE.database), dict[Cell, Found]()
    for seed in SEEDS:
        of_seed = {cell: spec for cell, spec in specs.items() if cell.seed == seed}
        shared = reading(next(iter(of_seed.values())), PLACE, store)
        for cell, spec in of_seed.items():
            results[cell] = found(cell, spec.study.name, store, shared)
    rows = [results[cell].row for cell in sorted(CELLS, key=lambda c: (c.limit, c.seed))]
    draw(rows)
    columns = ("limit", "seed", "solver", "M tokens", "M to winner", "MB", "KL search",
               "KL held-out", "seconds")  # fmt: skip
    table(columns, [told(row) for row in rows])
    write("search_quality", THREADS, rows, claims(results))


if __name__ == "__main__":
    main()
