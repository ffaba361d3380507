"""Does one search over all axes find a better front than a search over each alone?

Formula.     A point is (log10 of held-out KL, weight_bytes / dense, latency / dense) of a
             configuration. The hypervolume of a front is the volume that it dominates up to the
             reference point: KL of uniform w2g64:gptq of the same seed, and the dense model.
             An axis' point is matched where the joint space offers, within its bytes and its
             latency, a point whose held-out KL is at most 2 paired standard errors above its own.
             The joint space offers what its study has measured, and what its finished study
             answers for the costs of the axes' points as limits: the integer program on the loss
             table, alone and as corrected by what was measured, everywhere and near. No token is
             spent on these answers. Held-out data judge, and of all that is offered the best there
             counts, which favors the joint space; an axis' front is that on held-out data too,
             which favors the axis.
Assumptions. The shipped model. One study for each (space, seed), of the same tokens, with limits
             that the dense model keeps: solver "hybrid" maps the whole front then. A study's
             points are those that its search has scored on the full slice and found not beaten.
             One device, timed once; every point's latency is predicted by one table, that of a
             space that holds all options.
Ceiling.     The joint space holds all options of bits and drops, and width, sparsity and rank where
             they compose: no search is better than its loss table, which the same tokens must
             make for more options, and its front has one more dimension to fill. At KL below that
             of one dropped sub-block nothing but bits, outliers and fewer value dimensions is of
             use: there it can be little better, and each of many level points has one chance in
             44 to seem worse by 2 errors.
             An axis without latency credit (sparsity) has no volume.
Claims.      The joint front has the larger hypervolume than each axis'. No point of an axis' front,
             inside the reference box, is unmatched. Told beside it: how many the joint front
             leaves unmatched by what its study has measured alone.

Run: .venv/bin/python benchmarks/joint_space.py. Each cell (space, seed) is a study in one home
(`_cells.py`); the same command goes on after an interruption.
"""

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any

from _axes import AXES
from _cells import THREADS, Row, losses_mean, processes, reading, record_device, run_cells
from _fronts import LEAST_KL, Point, inside, least_excess, non_dominated, volume
from _joint_studies import (
    REFERENCE,
    SEEDS,
    SPACES,
    Finished,
    Judged,
    Shares,
    judged_answers,
    judged_front,
    priced,
    specification,
)
from _report import HOME, RESULTS, Claim, at_most, table, write

from apportion.cost_models.session import Timing
from apportion.studies.database.store import Store
from apportion.studies.home import Home
from apportion.studies.stages.confirm import SIGNIFICANT

BEYOND = 1.5
"""Of the reference's search loss: what is above it is outside the box, and is not judged."""
COLORS = {"bits": "#2a6fb0", "sparsity": "#c98a1b", "rank": "#7a5aa6", "width": "#3c8d5a",
          "drop": "#8a8a8a", "joint": "#c8442c"}  # fmt: skip
TIMING = Timing(operator_seconds=0.3, model_seconds=0.4)
"""Eighteen profiles, each with 24 whole models: shorter than a study of its own would time them."""
PLACE = Home.find(HOME / "joint_space")
KEYS = [(space, seed) for space in SPACES for seed in SEEDS]
Fronts = Mapping[tuple[str, int], Sequence[Point]]


def points(judged: Sequence[Judged], shares: Shares) -> list[Point]:
    """What was judged, with its costs by the table that all share."""
    return [
        Point(
            scored.origin,
            losses_mean(evaluation),
            *shares(scored.configuration),
            evaluation,
        )
        for scored, evaluation in judged
    ]


def fronts(pool: ProcessPoolExecutor, place: Home, shares: Shares) -> Fronts:
    """(space, seed) -> what its study has found, judged on held-out data."""
    asked: dict[tuple[str, int], Future[list[Judged]]] = {}
    for space, seed in KEYS:
        reference = Finished(specification("bits", seed, place), place).reference_loss()
        spec = specification(space, seed, place)
        asked[space, seed] = pool.submit(judged_front, spec, place, BEYOND * reference)
    return {key: points(future.result(), shares) for key, future in asked.items()}


def answers(
    pool: ProcessPoolExecutor, place: Home, shares: Shares, rivals: Fronts
) -> Mapping[int, Sequence[Point]]:
    """Seed -> what the joint study answers within the costs of each of the axes' points."""
    asked = {}
    for seed in SEEDS:
        costs = [(p.bytes, p.latency) for axis in AXES for p in rivals[axis, seed]]
        joint = specification("joint", seed, place)
        union = specification("everything", SEEDS[0], place)
        asked[seed] = pool.submit(judged_answers, joint, union, place, costs)
    return {seed: points(future.result(), shares) for seed, future in asked.items()}


def rows_of(
    found: Fronts, offered: Mapping[int, Sequence[Point]], spent: Mapping[Any, int], documents: Any
) -> list[Row]:
    """What is written of each (space, seed).

    Args:
        found: what the studies have found.
        offered: seed -> what the joint study answers beside.
        spent: (space, seed) -> tokens.
        documents: seed -> of which document each held-out window is.
    """
    rows: list[Row] = []
    for (space, seed), its in found.items():
        reference = next(p.kl for p in found["bits", seed] if p.origin == f"uniform:{REFERENCE}")
        row: Row = {
            "space": space,
            "seed": seed,
            "tokens": spent[space, seed],
            "reference_kl": reference,
            "hypervolume": volume(its, reference),
            "points": [[p.kl, p.bytes, p.latency, p.origin] for p in non_dominated(its)],
        }
        if space != "joint":
            inner = inside(non_dominated(its), reference)
            measured = found["joint", seed]
            both = [*measured, *offered[seed]]
            errors = [least_excess(p, both, documents[seed]) for p in inner]
            alone = [least_excess(p, measured, documents[seed]) for p in inner]
            row["inside"] = len(inner)
            row["unmatched"] = sum(each > SIGNIFICANT for each in errors)
            row["unmatched_by_measured"] = sum(each > SIGNIFICANT for each in alone)
            row["errors"] = errors
        rows.append(row)
    return rows


def claims(rows: Sequence[Row]) -> list[Claim]:
    """Larger volumes, and no point of an axis that is better."""
    of = {(row["space"], row["seed"]): row for row in rows}
    made = []
    for axis in AXES:
        for seed in SEEDS:
            more = of["joint", seed]["hypervolume"] - of[axis, seed]["hypervolume"]
            name = f"seed {seed}: hypervolume, joint - {axis}"
            made.append(Claim(name, more, "decades", "> 0", more > 0))
    for seed in SEEDS:
        worst = max((e for axis in AXES for e in of[axis, seed]["errors"]), default=-math.inf)
        name = f"seed {seed}: KL, best joint point within an axis point's costs - its own, largest"
        made.append(at_most(name, worst, "paired SE", SIGNIFICANT))
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
    matched = ["", "", ""]
    if "errors" in row:
        worst = max(row["errors"], default=-math.inf)
        unmatched = (row["unmatched"], row["unmatched_by_measured"])
        matched = [*(f"{count} of {row['inside']}" for count in unmatched), f"{worst:+.1f}"]
    return [
        row["space"],
        str(row["seed"]),
        f"{row['tokens'] / 1e6:.2f}",
        str(len(row["points"])),
        f"{row['hypervolume']:.4f}",
        *matched,
    ]


def main(place: Home = PLACE) -> None:
    """Run what is missing, then print, draw and write."""
    place.create()
    union = specification("everything", SEEDS[0], place)
    # Cells that run at a time are of different seeds: they have no evaluation in common.
    specs = {key: specification(*key, place) for key in KEYS}
    store = Store.open(place.database)
    with processes() as pool:
        recording = place.path / "device.json"
        pool.submit(record_device, [union, *specs.values()], place, recording, TIMING).result()
        run_cells(pool, list(specs.values()), place)
        shares = priced(reading(union, place, store))
        found = fronts(pool, place, shares)
        offered = answers(pool, place, shares, found)
    spent = {key: Finished(spec, place).tokens for key, spec in specs.items()}
    documents = {
        seed: reading(specs["bits", seed], place, store).samples("heldout").documents
        for seed in SEEDS
    }
    rows = rows_of(found, offered, spent, documents)
    draw(rows)
    columns = ("space", "seed", "M tokens", "points", "hypervolume", "unmatched",
               "by what was measured", "joint - axis, largest, SE")  # fmt: skip
    table(columns, [told(row) for row in rows])
    write("joint_space", THREADS, rows, claims(rows))


if __name__ == "__main__":
    main()
