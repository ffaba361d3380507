"""Profiles of a tiny model: measured for real, replayed from the store, refused elsewhere."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from apportion.cost_models import operators
from apportion.cost_models.fingerprint import fingerprint, fingerprint_hash
from apportion.cost_models.outlook import outlook
from apportion.cost_models.profile import Profile, measure_profile
from apportion.cost_models.recorded import read_recorded, write_recorded
from apportion.cost_models.requests import RequestItem
from apportion.cost_models.rows import shape_of
from apportion.cost_models.session import Timing
from apportion.cost_models.whole_model import compare_models, signature
from apportion.errors import InvalidInput
from apportion.spaces.discovery import discover
from apportion.spaces.entries import Entry, build_space
from apportion.spaces.narrowing import shared_copy

REQUEST = [RequestItem("forward", batch=2), RequestItem("forward", batch=4, count=3)]
QUICK = Timing(operator_seconds=0.005, model_seconds=0.01)


def measure(tiny, space, sample, known, record, **changes) -> Profile:
    arguments = {"threads": 1, "timing": QUICK, "configurations": 6, **changes}
    return measure_profile(tiny, space, REQUEST, sample, known=known, record=record, **arguments)


@pytest.fixture
def measured(tiny, space, sample) -> tuple[Profile, dict]:
    store: dict = {}
    return measure(tiny, space, sample, {}, store.update), store


def never(batch: dict) -> None:
    raise AssertionError(f"measured again: {list(batch)}")


def test_profile_replayed_from_the_store_is_identical(tiny, space, sample, measured) -> None:
    profile, store = measured
    stored = json.loads(json.dumps(store))
    assert measure(tiny, space, sample, stored, never) == profile
    assert measure(tiny, space, sample, stored, never, timing=None) == profile


def test_profile_interrupted_measures_only_the_rest(tiny, space, sample, measured) -> None:
    profile, store = measured
    lost = [key for key, value in store.items() if value.get("subject", {}).get("operators")]
    again: dict = {}
    rest = {key: value for key, value in store.items() if key not in lost}
    measure(tiny, space, sample, rest, again.update)
    assert sorted(again) == sorted(lost)


def test_profile_of_a_drop_for_a_constant_is_that_of_a_drop_and_of_a_sum(tiny, sample) -> None:
    entries = [Entry(("mlp:*",), ("keep", "drop", "drop:mean"))]
    space = build_space(discover(tiny, sample).sites, entries)
    store: dict = {}
    profile = measure(tiny, space, sample, {}, store.update, configurations=9)
    assert measure(tiny, space, sample, store, never, timing=None, configurations=9) == profile
    rows = profile.table.rows
    assert (rows[:, 1] == 0).all() and (rows[:, 2] > 0).all() and rows[0, 2] == rows[1, 2]
    sums = [s["subject"]["sum"] for s in store.values() if "sum" in s.get("subject", {})]
    assert sorted(sums) == [[[n, 8, 64], "float32", [64]] for n in (2, 4)]
    # Two like sites: six works, because a constant in place of one is another work than nothing.
    assert len([key for key, s in store.items() if "subject" in s]) == 2 * (6 + len(sums) // 2)


def test_outlook_counts_what_is_missing(tiny, space, sample, measured) -> None:
    _, store = measured
    options = {"threads": 1, "timing": QUICK, "configurations": 6}
    before = outlook(tiny, space, REQUEST, sample, known={}, **options)
    after = outlook(tiny, space, REQUEST, sample, known=store, **options)
    assert before.measured == 0 < before.seconds
    assert after.measured == after.operators == before.operators
    assert after.seconds == 0


def test_profile_gives_what_is_written_back_no_credit(memory) -> None:
    model, space = memory
    sample = torch.randn(2, 8, 64)
    profile = measure(model, space, sample, {}, lambda batch: None)
    assert profile.uncredited == {site.name: ["w4g32", "s60%"] for site in space.sites}
    assert {name for row in profile.implementations.values() for name in row.values()} == {
        "written back"
    }
    rows = profile.table.rows
    assert (rows == rows[:, :1]).all() and profile.table.base == profile.dense_ms


def test_profile_survives_json(measured) -> None:
    profile, _ = measured
    assert Profile.from_json(json.loads(json.dumps(profile.to_json()))) == profile


def test_profile_dense_configuration_is_exact(space, measured) -> None:
    profile, _ = measured
    table = profile.table
    total = table.base + shape_of(space).total(table.rows, (0,) * len(space.sites))
    assert total == pytest.approx(profile.dense_ms)
    assert profile.margin == 0.1 and len(profile.measured) == 6


def test_profile_options_that_run_dense_are_not_credited(measured) -> None:
    profile, _ = measured
    site = "blocks.0.mlp.down"
    assert profile.implementations[site]["s60%"] == "linear.f32"
    assert "s60%" in profile.uncredited[site]
    assert set(profile.implementations[site]) == set(profile.options[profile.sites.index(site)][1:])


def test_recorded_device_gives_the_profile_without_a_clock(
    tiny, space, sample, measured, tmp_path: Path
) -> None:
    profile, store = measured
    write_recorded(tmp_path / "device.json", profile.fingerprint, store)
    device = read_recorded(tmp_path / "device.json", fingerprint_hash(fingerprint(1)))
    options = {"fingerprint": device.fingerprint, "timing": None}
    assert measure(tiny, space, sample, device.measurements, never, **options) == profile


def test_recorded_device_missing_measurement_is_one_line(tiny, space, sample, measured) -> None:
    _, store = measured
    known = {key: store[key] for key in list(store)[:-1]}
    with pytest.raises(InvalidInput, match="recorded device: .* missing") as error:
        measure(tiny, space, sample, known, never, timing=None)
    assert "\n" not in str(error.value)


def test_recorded_device_refuses_another_fingerprint(tmp_path: Path) -> None:
    write_recorded(tmp_path / "device.json", fingerprint(1), {})
    with pytest.raises(InvalidInput, match="measured on another device"):
        read_recorded(tmp_path / "device.json", fingerprint_hash(fingerprint(2)))


@pytest.mark.parametrize(
    ("text", "word"), [(None, "no file"), ("{", "cannot be read"), ("{}", "does not hold")]
)
def test_recorded_device_damaged_file_is_refused(
    text: str | None, word: str, tmp_path: Path
) -> None:
    path = tmp_path / "device.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InvalidInput, match=word):
        read_recorded(path)


def test_compared_models_have_the_ratio_of_their_work(tiny, sample) -> None:
    twice = torch.nn.Sequential(tiny.blocks, torch.nn.Identity())
    twice.forward = lambda x: tiny(tiny(x)[..., :1].expand(x.shape))  # type: ignore[method-assign]
    found = compare_models(
        {"same": lambda: shared_copy(tiny), "twice": lambda: twice},
        tiny, REQUEST, sample, threads=1, seconds=0.15,
    )  # fmt: skip
    assert 1.4 * found["same"].ratio < found["twice"].ratio < 3 * found["same"].ratio
    assert found["same"].low <= found["same"].ratio <= found["same"].high


def test_profile_option_that_nothing_serves_costs_as_dense(
    tiny, space, sample, monkeypatch
) -> None:
    offered = operators.serving
    monkeypatch.setattr(
        operators, "serving", lambda f, *rest: [] if f.activation_bits else offered(f, *rest)
    )
    profile = measure(tiny, space, sample, {}, lambda batch: None)
    site = space.index("blocks.0.mlp.down")
    refused = space.texts[site].index("w8a8")
    assert profile.rows[site][refused] == profile.rows[site][0]
    assert "w8a8" in profile.uncredited["blocks.0.mlp.down"]


def test_modules_that_differ_in_geometry_alone_are_not_timed_as_one() -> None:
    def of(stride: int, pool: int) -> str:
        parts = (nn.Conv2d(2, 2, 3, stride, padding=1), nn.MaxPool2d(pool), nn.ReLU())
        return signature(nn.Sequential(*parts))

    assert of(1, 2) == of(1, 2)
    assert len({of(1, 2), of(2, 2), of(1, 3)}) == 3
