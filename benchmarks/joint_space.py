"""Does one search over all axes find a better front than a search over each alone?

Formula.     A point is (log10 of held-out KL, weight_bytes / dense, latency / dense) of a
             configuration. The hypervolume of a front is the volume that it dominates up to the
             reference point: KL of uniform w2g64:gptq of the same seed, and the dense model.
             At the limits of a target, what a space offers is the point of least search loss
             among all its points that keep them; the joint space's held-out KL less an axis',
             paired over windows, is told in standard errors.
Assumptions. The shipped model. Each (space, seed) has the same tokens, shared out evenly among
             its targets: the pairs of limits that it can meet, in shares of dense. Solver "hybrid".
             Its points are all that its studies' reports hold and its searches have scored on
             the full slice: fronts and uniform configurations. One device, timed once; every
             point's latency is predicted by one table, that of a space that holds all options.
Ceiling.     The joint space holds all options of bits and drops, and width, sparsity and rank where
             they compose: no search is better than its loss table, which the same tokens must
             make for more options. At KL below that of one dropped sub-block the joint space has
             nothing that bits have not, so it can at best be level there, point by point:
             between two of its points any point of bits is better than both are together.
             An axis without latency credit (sparsity) has no volume.
Claims.      The joint front has the larger hypervolume than each axis'. No point of an axis' front,
             inside the reference box, is better by more than 2 standard errors than the best
             joint point that is neither larger nor slower ("unmatched" counts those that are).
             At no target's limits does an axis offer a point that is better by more than that.

Run: .venv/bin/python benchmarks/joint_space.py. Each cell (space, target, seed) is a study in one
home (`_cells.py`); the same command goes on after an interruption.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from _axes import AXES
from _cells import (
    THREADS,
    Row,
    losses_mean,
    processes,
    reading,
    record_device,
    run_cells,
    stage_outputs,
)
from _fronts import (
    LEAST_KL,
    Point,
    chosen,
    excess,
    inside,
    least_excess,
    non_dominated,
    volume,
    within,
)
from _joint_studies import (
    SEEDS,
    SPACES,
    TARGETS,
    TOKENS,
    Key,
    Shares,
    cells,
    priced,
    specification,
)
from _report import HOME, RESULTS, Claim, at_most, table, write

from apportion.cost_models.session import Timing
from apportion.studies.context import Context
from apportion.studies.database.store import Store
from apportion.studies.home import Home
from apportion.studies.specification import StudySpec
from apportion.studies.stages.confirm import SIGNIFICANT

REFERENCE = "w2g64:gptq"
COLORS = {"bits": "#2a6fb0", "sparsity": "#c98a1b", "rank": "#7a5aa6", "width": "#3c8d5a",
          "drop": "#8a8a8a", "joint": "#c8442c"}  # fmt: skip
TIMING = Timing(operator_seconds=0.3, model_seconds=0.4)
"""Eighteen profiles, each with 24 whole models: shorter than a study of its own would time them."""
PLACE = Home.find(HOME / "joint_space")


@dataclass(frozen=True)
class Searched:
    """What all studies of a (space, seed) came to.

    Attributes:
        studies: how many.
        tokens: spent.
        points: that the reports hold and the searches have scored on the full slice.
        uniform: option -> held-out KL everywhere.
    """

    studies: int
    tokens: int
    points: Sequence[Point]
    uniform: Mapping[str, float]


def searched(
    specs: Sequence[StudySpec], store: Store, context: Context, shares: Shares
) -> Searched:
    """Read the finished studies of a (space, seed); `context` is any of that seed."""
    windows, tokens = context.samples("heldout").windows, 0
    points, uniform = dict[str, Point](), dict[str, float]()
    for spec in specs:
        study_id, (report, compressed) = stage_outputs(store, spec.study.name, "report", "compress")
        tokens += sum(t.windows for t in store.trials(study_id, 0)) * context.window_tokens
        uniform |= {row["option"]: row["loss_heldout"] for row in report["uniform"]}
        naming = context.naming(compressed["index"])
        scored = [row for row in [*report["front"], *report["uniform"]] if row["number"] >= 0]
        for row in scored:
            key = naming.key(row["configuration"], "heldout", 0, windows)
            evaluation = store.evaluations([key])[key]
            costs = shares(row["configuration"])
            points[key] = Point(
                row["origin"], row["loss_search"], losses_mean(evaluation), *costs, evaluation
            )
    return Searched(len(specs), tokens, list(points.values()), uniform)


def rows_of(found: Mapping[Key, Searched], documents: Mapping[int, Any]) -> list[Row]:
    """What is written of each (space, seed)."""
    rows: list[Row] = []
    for (space, seed), each in found.items():
        reference = found["bits", seed].uniform[REFERENCE]
        front = non_dominated(each.points)
        row: Row = {
            "space": space,
            "seed": seed,
            "studies": each.studies,
            "tokens": each.tokens,
            "reference_kl": reference,
            "hypervolume": volume(each.points, reference),
            "points": [[p.kl, p.bytes, p.latency, p.origin] for p in front],
        }
        if space != "joint":
            joint = found["joint", seed].points
            beaten = [least_excess(p, joint, documents[seed]) for p in inside(front, reference)]
            row["at_limits"] = at_limits(each.points, joint, documents[seed])
            row["inside"] = len(beaten)
            row["better"] = sum(errors > SIGNIFICANT for errors in beaten)
            row["errors"] = max(beaten, default=-math.inf)
        rows.append(row)
    return rows


def at_limits(points: Sequence[Point], joint: Sequence[Point], documents: Any) -> list[Row]:
    """For each target that an axis has a point for: its choice against that of the joint space."""
    told: list[Row] = []
    for most_bytes, most_latency in TARGETS:
        mine = chosen(within(points, most_bytes, most_latency))
        theirs = chosen(within(joint, most_bytes, most_latency))
        if mine is not None:
            errors = math.inf if theirs is None else excess(theirs, mine, documents)
            joint_kl = math.nan if theirs is None else theirs.kl
            limits = {"weight_bytes": most_bytes, "latency": most_latency}
            told.append(limits | {"kl": mine.kl, "joint_kl": joint_kl, "errors": errors})
    return told


def claims(rows: Sequence[Row]) -> list[Claim]:
    """Larger volumes, no point of an axis that is better, and none at the targets' limits."""
    of = {(row["space"], row["seed"]): row for row in rows}
    made = []
    for axis in AXES:
        for seed in SEEDS:
            more = of["joint", seed]["hypervolume"] - of[axis, seed]["hypervolume"]
            name = f"seed {seed}: hypervolume, joint - {axis}"
            made.append(Claim(name, more, "decades", "> 0", more > 0))
    for seed in SEEDS:
        worst = max(of[axis, seed]["errors"] for axis in AXES)
        name = f"seed {seed}: KL, best joint point within an axis point's costs - its own, largest"
        made.append(at_most(name, worst, "paired SE", SIGNIFICANT))
    for seed in SEEDS:
        most = max(each["errors"] for a in AXES for each in of[a, seed]["at_limits"])
        name = f"seed {seed}: KL at equal limits, joint - the best axis, largest of the targets"
        made.append(at_most(name, most, "paired SE", SIGNIFICANT))
    return made


def draw(rows: Sequence[Row]) -> None:
    """KL against bytes and against latency, a color for each space."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2, sharey=True)
    for row in rows:
        style = {"color": COLORS[row["space"]], "s": 16 if row["space"] == "joint" else 9}
        label = row["space"] if row["seed"] == SEEDS[0] else None
        for axes, place in zip(panels, (1, 2), strict=True):
            axes.scatter(
                [point[place] for point in row["points"]],
                [max(point[0], LEAST_KL) for point in row["points"]],
                label=label,
                **style,
            )
    for axes, text in zip(panels, ("weight_bytes / dense", "latency / dense"), strict=True):
        axes.set_yscale("log")
        axes.set_xlabel(text)
        axes.grid(alpha=0.25)
    panels[0].set_ylabel("held-out KL, nats")
    panels[0].legend(frameon=False, fontsize=8)
    RESULTS.mkdir(exist_ok=True)
    figure.savefig(RESULTS / "joint_space.png", dpi=150)


def told(row: Row) -> list[str]:
    """A row as text."""
    limits = max(row.get("at_limits", ()), key=lambda each: each["errors"], default=None)
    against = ["", "", ""]
    if limits is not None:
        against = [
            f"{limits['weight_bytes']}x, {limits['latency']}x",
            f"{limits['kl']:.4g}, {limits['joint_kl']:.4g}",
            f"{limits['errors']:+.1f}",
        ]
    return [
        row["space"],
        str(row["seed"]),
        str(row["studies"]),
        f"{row['tokens'] / 1e6:.2f}",
        str(len(row["points"])),
        f"{row['hypervolume']:.4f}",
        f"{row['better']} of {row['inside']}" if "better" in row else "",
        *against,
    ]


def main(place: Home = PLACE) -> None:
    """Run what is missing, then print, draw and write."""
    place.create()
    union = specification("everything", SEEDS[0], TARGETS[0], TOKENS, place)
    timed = [specification(s, seed, TARGETS[0], TOKENS, place) for s in SPACES for seed in SEEDS]
    with processes() as pool:
        recording = place.path / "device.json"
        pool.submit(record_device, [union, *timed], place, recording, TIMING).result()
        specs = cells(pool, place)
        # Cells that run at a time are of different seeds: they have no evaluation in common.
        turns = zip_longest(*specs.values())
        run_cells(pool, [spec for turn in turns for spec in turn if spec], place)
    store = Store.open(place.database)
    shares = priced(reading(union, place, store))
    found, documents = dict[Key, Searched](), dict[int, Any]()
    for seed in SEEDS:
        context = reading(specs["bits", seed][0], place, store)
        documents[seed] = context.samples("heldout").documents
        for space in SPACES:
            found[space, seed] = searched(specs[space, seed], store, context, shares)
    rows = rows_of(found, documents)
    draw(rows)
    columns = ("space", "seed", "studies", "M tokens", "points", "hypervolume", "unmatched",
               "worst at limits", "KL, joint KL", "joint - axis, SE")  # fmt: skip
    table(columns, [told(row) for row in rows])
    write("joint_space", THREADS, rows, claims(rows))


if __name__ == "__main__":
    main()
