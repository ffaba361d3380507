"""How records are shown: the front, the check, the status."""

from collections.abc import Mapping, Sequence

from apportion.studies.cli.display import Display, duration
from apportion.studies.cli.records import (
    CheckReport,
    Latency,
    Need,
    Point,
    Report,
    Status,
    StudyRow,
    Uniform,
    Verification,
)
from apportion.units import format_bytes

UNKNOWN = "-"


def show_front(display: Display, report: Report) -> None:
    """The front, the uniform configurations, the winner and its best uniform rival."""
    limits = ", ".join(f"{kind} <= {text}" for kind, text in report["limits"].items())
    display.line("")
    display.line(f" front (limits: {limits})")
    points: list[Point | Uniform] = [*report["front"], *report["uniform"]]
    devices = list(dict.fromkeys(name for point in points for name in point["latency_ms"]))
    latency = [f"latency {d} ms" if len(devices) > 1 else "latency ms" for d in devices]
    columns = ["", "#", f"held-out {report['loss']}", *latency]
    widths = ["width"] if any(point.get("width") for point in points) else []
    caches = ["cache B"] if any("cache_bytes" in point for point in points) else []
    columns += ["size MB", *caches, "bits", "sparsity", "rank", *widths, "dropped"]
    rows = [_front_row(point, devices, report["winner"]) for point in report["front"]]
    rows += [_front_row(u, devices, None, f"u {u['option']}") for u in report["uniform"]]
    if not widths:
        rows = [[*row[:-2], row[-1]] for row in rows]
    display.table(columns, rows, [*_footnotes(report, points), *report["notes"]])


def _front_row(
    point: Point | Uniform, devices: Sequence[str], winner: int | None, label: str | None = None
) -> list[str]:
    mark = "*" if label is None and point["number"] == winner else ""
    kinds = point["dropped"].items()
    return [
        mark,
        label or str(point["number"]),
        with_error(point["loss_heldout"], point["loss_error"]),
        *(_milliseconds(point["latency_ms"].get(device)) for device in devices),
        f"{point['weight_bytes'] / 1e6:.3g}",
        *([f"{point['cache_bytes']:.4g}"] if "cache_bytes" in point else []),
        f"{point['bits']:.2f}",
        _percent(point["sparsity"]),
        _percent(point["rank"]),
        _percent(point.get("width", 0.0)),
        ", ".join(f"{count} {kind}" for kind, count in kinds if count) or UNKNOWN,
    ]


def _footnotes(report: Report, points: Sequence[Point | Uniform]) -> list[str]:
    notes = []
    if any(u for u in report["uniform"]):
        notes.append("u: the same option at every site that takes it")
    if any(t["measured"] is None for point in points for t in point["latency_ms"].values()):
        notes.append("~: predicted, not measured end to end")
    if report["winner"] is None:
        return notes
    chosen = "* chosen: the least loss within the limits."
    rivals = [u for u in report["uniform"] if u["option"] == report["rival"]]
    if not rivals:
        return [*notes, f"{chosen} No uniform configuration stays within its costs."]
    rival = rivals[0]
    winner = next((p for p in report["front"] if p["number"] == report["winner"]), None)
    difference = with_error(rival["difference"], rival["standard_error"])
    less = _times_less(winner, rival)
    notes.append(f"{chosen} {less} {rival['option']} (paired difference {difference}).")
    return notes


def _times_less(winner: Point | None, rival: Uniform) -> str:
    ours, theirs = winner and winner["loss_heldout"], rival["loss_heldout"]
    if ours and theirs and ours > 0 and theirs > ours:
        return f"{theirs / ours:.1f}x less loss than its best uniform rival,"
    return "Its best uniform rival is"


def show_check(display: Display, report: CheckReport) -> None:
    """What the study would do, and whether memory and disk suffice."""
    display.line(
        f" {report['sites']} sites ({report['weight_sites']} weight, {report['structure_sites']} "
        f"structure) · {report['options']} options · fixed (embeddings, norms, head): "
        f"{format_bytes(report['fixed_bytes'])}"
    )
    for name, device in report["devices"].items():
        left = device["operators"] - device["measured"]
        time = f", about {duration(device['seconds'])}" if left else ""
        display.line(
            f" latency table for '{name}': {device['measured']} of {device['operators']} "
            f"operators measured{time}"
        )
    seconds = report["search_seconds"]
    plural = "" if report["workers"] == 1 else "s"
    search = "" if seconds is None else f" · search about {duration(seconds)}"
    workers = f" with {report['workers']} worker{plural}" if search else ""
    memory, disk = need("memory", report["memory"]), need("disk", report["disk"])
    display.line(f" {memory} · {disk}{search}{workers}")
    for warning in report["warnings"]:
        display.warning(warning)


def need(word: str, amounts: Need) -> str:
    """ "memory 5.1 GB of 22 GB free (model 2.5 GB, activations 2.2 GB)"."""
    parts = ", ".join(f"{part} {format_bytes(size)}" for part, size in amounts["parts"].items())
    text = f"{word} {format_bytes(amounts['needed'])} of {format_bytes(amounts['free'])} free"
    return f"{text} ({parts})" if parts else text


def status_line(status: Status) -> str:
    """How far a study is, in one line."""
    counts = {"worker": status["workers"]} if status["state"] == "running" else {}
    words = [
        f"{status['state']}: {status['stage']}" if status["stage"] else status["state"],
        tokens(status),
        f"best {status['loss']} {number(status['best_loss'])}",
        *(f"{count} {word}{'' if count == 1 else 's'}" for word, count in counts.items()),
    ]
    if status["recoveries"]:
        many = f"{status['recoveries']} recover{'y' if status['recoveries'] == 1 else 'ies'}"
        words.append(f"{many} ({duration(status['wasted_seconds'])} of workers wasted)")
    words += [f"changed: {change}" for change in status["changes"]]
    if status["cached"]:
        words.append(f"{status['cached']} evaluated before")
    if status["seconds_left"] is not None:
        words.append(f"{duration(status['seconds_left'])} left")
    return " " + " · ".join(words)


def tokens(row: StudyRow | Status) -> str:
    """ "4.20 of 8.00 M tokens"; what is not text is counted in samples."""
    return spent(row["tokens_spent"], row["tokens"], row["unit"])


def spent(done: int, budget: int, unit: str) -> str:
    """How much of the budget is spent; millions from 100,000 on."""
    if budget < 100_000:
        return f"{done:,} of {budget:,} {unit}"
    return f"{done / 1e6:.2f} of {budget / 1e6:.2f} M {unit}"


def verification_line(found: Verification) -> str:
    """What a fresh process found, beside what was promised."""
    losses = f"{found['loss']} {number(found['loss_found'])} ({number(found['loss_promised'])})"
    times = [
        f"{name} {_milliseconds(latency)} ms (promised {latency['predicted']:.3g} ms)"
        for name, latency in found["latency_ms"].items()
    ]
    size = format_bytes(found["weight_bytes"])
    return f" verified in a fresh process: {', '.join([losses, *times, size])}"


def with_error(value: float | None, error: float | None) -> str:
    """ "0.012 ±0.001"."""
    return number(value) if error is None else f"{number(value)} ±{number(error)}"


def number(value: float | None) -> str:
    """Three significant digits, "-" for what is not known."""
    return UNKNOWN if value is None else f"{value:.3g}"


def _milliseconds(latency: Latency | None) -> str:
    if latency is None:
        return UNKNOWN
    measured = latency["measured"]
    return f"~{latency['predicted']:.3g}" if measured is None else f"{measured:.3g}"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share else UNKNOWN


def site_counts(kinds: Mapping[str, int]) -> str:
    """ "24 linear, 6 attention"."""
    return ", ".join(f"{count} {kind}" for kind, count in kinds.items())
