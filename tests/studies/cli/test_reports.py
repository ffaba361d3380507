"""How results are shown."""

import io

from apportion.studies.cli.display import ConsoleDisplay
from apportion.studies.cli.records import CheckReport, Point, Report, Status, Uniform
from apportion.studies.cli.reports import show_check, show_front, status_line

POINT: Point = {
    "number": 4,
    "origin": "ilp:0.9",
    "loss_search": 0.011,
    "loss_heldout": 0.012,
    "loss_error": 0.001,
    "weight_bytes": 2_100_000,
    "latency_ms": {"here": {"predicted": 9.0, "measured": 8.9}},
    "bits": 3.41,
    "sparsity": 0.0,
    "rank": 0.12,
    "dropped": {"attention": 1},
}
RIVAL: Uniform = {
    **POINT,
    "option": "w3g64",
    "number": 2,
    "loss_heldout": 0.031,
    "latency_ms": {"here": {"predicted": 9.0, "measured": None}},
    "difference": 0.019,
    "standard_error": 0.002,
}
REPORT: Report = {
    "study": "demo",
    "loss": "KL",
    "limits": {"weight_bytes": "1x w3g64"},
    "front": [POINT],
    "uniform": [RIVAL],
    "winner": 4,
    "rival": "w3g64",
    "notes": ["a note"],
}


def shown(report: Report) -> str:
    file = io.StringIO()
    show_front(ConsoleDisplay(file), report)
    return file.getvalue()


def test_front_marks_the_winner_and_its_rival() -> None:
    text = shown(REPORT)
    assert "front (limits: weight_bytes <= 1x w3g64)" in text
    assert "* " in next(line for line in text.splitlines() if "0.012 ±0.001" in line)
    assert "u w3g64" in text and "~9" in text and "12 %" in text and "1 attention" in text
    assert "2.6x less loss than its best uniform rival, w3g64" in text
    assert "paired difference 0.019 ±0.002" in text
    assert text.splitlines()[-1] == " a note"


def test_front_without_rival_says_so() -> None:
    assert "No uniform configuration stays within its costs" in shown(REPORT | {"rival": None})


def test_status_in_one_line() -> None:
    status: Status = {
        "name": "demo",
        "state": "running",
        "stage": "search",
        "tokens_spent": 4_200_000,
        "tokens": 8_000_000,
        "unit": "tokens",
        "best_loss": 0.083,
        "created": "2026-01-01T00:00:00",
        "loss": "KL",
        "workers": 2,
        "recoveries": 1,
        "wasted_seconds": 61.24,
        "bill": {"done": {"executions": 400, "seconds": 900.0}},
        "changes": ["limits.latency.here = 0.4x dense", "2 workers"],
        "cached": 37,
        "seconds_left": 1440.0,
    }
    assert status_line(status) == (
        " running: search · 4.20 of 8.00 M tokens · best KL 0.083 · 2 workers"
        " · 1 recovery (61.2 s of workers wasted) · changed: limits.latency.here = 0.4x dense"
        " · changed: 2 workers · 37 evaluated before · 24 min left"
    )


def test_check_says_sites_times_and_needs() -> None:
    report: CheckReport = {
        "sites": 42,
        "weight_sites": 24,
        "structure_sites": 18,
        "options": 9,
        "fixed_bytes": 525_000_000,
        "devices": {"here": {"operators": 96, "measured": 0, "seconds": 121.0}},
        "memory": {"needed": 5_100_000_000, "free": 22_000_000_000, "parts": {"model": 2 * 10**9}},
        "disk": {"needed": 34 * 10**8, "free": 80 * 10**9, "parts": {}},
        "search_seconds": 3060.0,
        "workers": 1,
        "warnings": ["on battery"],
    }
    file = io.StringIO()
    show_check(ConsoleDisplay(file), report)
    text = file.getvalue()
    assert "42 sites (24 weight, 18 structure) · 9 options · fixed" in text
    assert "latency table for 'here': 0 of 96 operators measured, about 2 min" in text
    assert "memory 5.1 GB of 22 GB free (model 2 GB) · disk 3.4 GB of 80 GB free" in text
    assert "search about 51 min with 1 worker" in text
    assert "warning: on battery" in text
