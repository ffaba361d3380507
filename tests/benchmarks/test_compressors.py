"""The page on compressors tells what its benchmark found, and the benchmark measures right."""

import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

from apportion.spaces.compressors.compose import InputStatistics

ROOT = Path(__file__).parents[2]


@pytest.fixture
def compressors(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import compressors

    return compressors


@pytest.fixture
def seen() -> InputStatistics:
    inputs = torch.randn(64, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return InputStatistics(inputs.T @ inputs, len(inputs))


def test_page_and_claims_are_of_the_results(compressors: ModuleType) -> None:
    report = json.loads((ROOT / "benchmarks" / "results" / "compressors.json").read_text())
    text = compressors.PAGE.read_text(encoding="utf-8")
    assert compressors.page(text, report["rows"]) == text
    made = compressors.claims(report["rows"]) + compressors.llm_compressor.claims(report["rows"])
    assert [vars(claim) for claim in made] == report["claims"]


def test_results_hold_every_option_and_recipe(compressors: ModuleType) -> None:
    rows = json.loads((ROOT / "benchmarks" / "results" / "compressors.json").read_text())["rows"]
    options = {row["option"]: row.get("rival") for row in rows if row["kind"] == "option"}
    assert options == compressors.RIVALS
    assert len(rows) - len(options) == 8


def test_compensation_has_no_more_bytes_than_its_rival(compressors: ModuleType) -> None:
    rows = json.loads((ROOT / "benchmarks" / "results" / "compressors.json").read_text())["rows"]
    of = {row["option"]: row for row in rows if row["kind"] == "option"}
    judged = [of[option] for options in compressors.SENTENCES.values() for option in options]
    assert all(row["bytes"] <= row["rival_bytes"] for row in judged)


def test_layer_error_is_the_share_of_the_outputs(compressors: ModuleType) -> None:
    from shipped_options import layer_error

    draw = torch.Generator().manual_seed(0)
    inputs, dense, made = (
        torch.randn(*size, generator=draw, dtype=torch.float64)
        for size in ((20, 8), (5, 8), (5, 8))
    )
    lost = (inputs @ (made - dense).T).square().sum() / (inputs @ dense.T).square().sum()
    seen = InputStatistics(inputs.T @ inputs, len(inputs))
    assert layer_error(dense, made, seen) == pytest.approx(float(lost), rel=1e-12)
    assert layer_error(dense, dense, seen) == 0


def test_weights_on_their_grid_stay_where_they_are(
    compressors: ModuleType, seen: InputStatistics
) -> None:
    draw = torch.Generator().manual_seed(2)
    codes = torch.randint(-4, 4, (5, 8), generator=draw)
    scale, zero = torch.rand(5, 2, generator=draw) + 0.5, torch.tensor([[1.0, -2.0]] * 5)
    spread = [each.repeat_interleave(4, 1) for each in (scale, zero)]
    weight = (codes - spread[1]) * spread[0]
    found = compressors.llm_compressor.on_grid(weight, 3, seen, scale, zero)
    torch.testing.assert_close(found, weight)
