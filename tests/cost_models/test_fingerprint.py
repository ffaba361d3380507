"""Which machine, and in which state."""

import json
from pathlib import Path

import pytest

from apportion.cost_models import fingerprint as module
from apportion.cost_models.fingerprint import conditions, doubt, fingerprint, fingerprint_hash

QUIET = {"load": [0.1, 0.1, 0.1], "cores": 2, "power": "mains", "governor": "performance"}


def test_fingerprint_is_stable_json() -> None:
    assert json.loads(json.dumps(fingerprint(2))) == fingerprint(2)
    assert fingerprint_hash(fingerprint(2)) == fingerprint_hash(fingerprint(2))


def test_fingerprint_other_threads_is_another() -> None:
    assert fingerprint_hash(fingerprint(1)) != fingerprint_hash(fingerprint(2))


def test_conditions_of_this_machine_can_be_judged() -> None:
    found = conditions()
    assert set(found) == set(QUIET)
    assert doubt(found) is None or doubt(found).count("\n") == 0


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({}, None),
        ({"load": [3.0, 0, 0]}, "load 3.0 on 2 cores"),
        ({"power": "battery"}, "on battery"),
        ({"governor": "powersave"}, "powersave"),
    ],
    ids=["quiet", "busy", "battery", "governor"],
)
def test_doubt_names_the_reason(change: dict, word: str | None) -> None:
    told = doubt(QUIET | change)
    assert told is None if word is None else word in (told or "")


def test_power_source_discharging_battery(tmp_path: Path, monkeypatch) -> None:
    supply = tmp_path / "BAT0"
    supply.mkdir()
    (supply / "type").write_text("Battery\n")
    (supply / "status").write_text("Discharging\n")
    monkeypatch.setattr(module, "POWER", tmp_path)
    assert conditions()["power"] == "battery"
