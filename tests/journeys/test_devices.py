"""Several devices, and every kind of limit."""

import json
from typing import Any

import pytest

Journey = Any


def scaled(journey: Journey, factor: float) -> None:
    """A second recorded device that is `factor` times as slow."""
    recorded = json.loads((journey.folder / "timings.json").read_text())
    recorded["fingerprint"]["cpu"] = "another"
    for stored in recorded["measurements"].values():
        if "measurement" in stored:
            stored["measurement"]["milliseconds"] *= factor
    (journey.folder / "slow.json").write_text(json.dumps(recorded))
    text = '[devices.slow]\nkind = "recorded"\nfile = "slow.json"\n'
    text += 'request = [{ phase = "forward", batch = 1, count = 2 }]\n[limits]\n'
    journey.edit("study.toml", "[limits]\n", text)


def winner(journey: Journey) -> dict[str, Any]:
    ended = journey.submit()
    assert (ended.status, ended.error) == (0, "")
    report = json.loads(journey.run("show", "tiny", "--json").out)
    return next(point for point in report["front"] if point["number"] == report["winner"])


def test_worst_of_two_devices(journey: Journey) -> None:
    scaled(journey, 3.0)
    journey.edit("study.toml", 'latency.here = "1x dense"', 'latency.worst = "0.9x dense"')
    point = winner(journey)
    times = {name: found["predicted"] for name, found in point["latency_ms"].items()}
    assert times["slow"] == pytest.approx(6 * times["here"], rel=1e-3)


def test_milliseconds_and_bits(journey: Journey) -> None:
    journey.edit("study.toml", '"1x dense"', '"900 ms"')
    journey.edit("study.toml", 'weight_bytes = "0.4x dense"', 'bits = "9"')
    point = winner(journey)
    assert point["bits"] <= 9
    assert point["latency_ms"]["here"]["predicted"] < 900


def test_bytes_in_memory_and_in_units_of_an_option(journey: Journey) -> None:
    journey.edit("study.toml", 'latency.here = "1x dense"', 'resident_bytes = "1x dense"')
    journey.edit("study.toml", '"0.4x dense"', '"1x w8"')
    assert winner(journey)["weight_bytes"] < 100_000


def test_limit_between_what_can_be_and_its_margin(journey: Journey) -> None:
    journey.edit("study.toml", '"1x dense"', '"0.001x dense"')
    ended = journey.submit()
    assert (ended.status, len(ended.error.splitlines())) == (2, 1)
    assert "limits cannot be met: latency.here" in ended.error
    assert " ms" in ended.error and "weight_bytes" not in ended.error


@pytest.mark.parametrize("solver", ["uniform", "greedy", "ilp", "evopress", "optuna:tpe"])
def test_every_solver_ends(journey: Journey, solver: str) -> None:
    journey.edit("study.toml", "[search]", f'[search]\nsolver = "{solver}"')
    assert winner(journey)["number"] >= 0
