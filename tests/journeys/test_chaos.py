"""Workers and drivers are struck while they evaluate: the study ends as if nothing had happened."""

from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_struck_workers_and_drivers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import chaos

    cell = chaos.Cell("evopress", "sqlite", 140, workers=2, worker_every=1.5, driver_every=6.0)
    row = chaos.run_cell(cell)
    assert row["worker_kills"] + row["worker_stops"] > 0, row
    assert row["driver_kills"] + row["driver_stops"] > 0, row
    broken = [claim.name for claim in chaos.claims([row]) if not claim.holds]
    assert not broken, row
