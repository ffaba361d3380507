"""The front as a picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from apportion.errors import InvalidInput
from apportion.studies.cli.records import Point, Report, Uniform

FORMATS = (".png", ".svg", ".pdf")
INCHES = (9.0, 5.2)
BLUE, RED, GRAY = "#2a6fb0", "#c8442c", "#8a8a8a"


def draw(report: Report, path: Path) -> Path:
    """Held-out loss against size, and against the latency of each device.

    Raises:
        InvalidInput: matplotlib is missing, or the file's name ends in no known format.
    """
    if path.suffix.lower() not in FORMATS:
        raise InvalidInput(f"{path}: a picture's name ends in one of {', '.join(FORMATS)}")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise InvalidInput('matplotlib is missing: pip install "apportion[plot]"') from None
    devices = list(report["front"][0]["latency_ms"]) if report["front"] else []
    figure = Figure(figsize=INCHES, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 1 + len(devices), squeeze=False)[0]
    _panel(axes[0], report, None, "size, MB")
    for place, device in enumerate(devices, 1):
        _panel(axes[place], report, device, f"latency on '{device}', ms")
    axes[0].set_ylabel(f"held-out {report['loss']}")
    axes[0].legend(frameon=False, fontsize=8)
    figure.suptitle(f"{report['study']}: front and uniform configurations", fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path


def _cost(point: Point | Uniform, device: str | None) -> float:
    if device is None:
        return point["weight_bytes"] / 1e6
    found = point["latency_ms"][device]
    return found["measured"] or found["predicted"]


def _panel(axes: Any, report: Report, device: str | None, label: str) -> None:
    _series(axes, report["front"], device, BLUE, "o", "front")
    _series(axes, report["uniform"], device, GRAY, "s", "uniform")
    chosen = [p for p in report["front"] if p["number"] == report["winner"]]
    _series(axes, chosen, device, RED, "*", "chosen", size=14)
    for point in report["uniform"]:
        if point["loss_heldout"]:
            place = (_cost(point, device), point["loss_heldout"])
            axes.annotate(
                point["option"], place, (4, 3), textcoords="offset points", fontsize=7, color=GRAY
            )
    axes.set_yscale("log")
    axes.set_xlabel(label)
    axes.grid(alpha=0.25)


def _series(
    axes: Any,
    points: Sequence[Point | Uniform],
    device: str | None,
    color: str,
    marker: str,
    label: str,
    size: float = 6,
) -> None:
    known = [p for p in points if p["loss_heldout"] and p["loss_heldout"] > 0]
    axes.errorbar(
        [_cost(p, device) for p in known],
        [p["loss_heldout"] for p in known],
        yerr=[p["loss_error"] or 0.0 for p in known],
        fmt=marker,
        color=color,
        markersize=size,
        elinewidth=1,
        label=label,
    )
