"""Files go after the rows that name them, and never while somebody may need them."""

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from apportion.errors import InvalidInput
from apportion.studies.database import Lease, Store
from apportion.studies.home import Home
from apportion.studies.upkeep import collect, collect_bank, delete, note_database, stored

OURS, SHARED, NOBODYS = "aa" + "0" * 30, "bb" + "0" * 30, "cc" + "0" * 30


@dataclass
class Place:
    """A home with a finished study, another that shares an entry with it, and garbage."""

    home: Home
    store: Store

    def entry(self, key: str) -> Path:
        return self.home.bank / key[:2] / f"{key}.safetensors"

    def entries(self) -> set[str]:
        return {file.stem for file in self.home.bank.rglob("*.safetensors")}

    def make_entry(self, key: str) -> None:
        self.entry(key).parent.mkdir(exist_ok=True)
        self.entry(key).write_bytes(bytes(1000))

    def study(self, name: str, *entries: str) -> Lease:
        """Its compress stage has named the entries; without entries it has not ended."""
        lease = self.store.acquire(self.store.create_study(name, {}, "hash").id, 60)
        index = {f"site {key}": {"w4g64": key} for key in entries}
        if entries:
            self.store.record_stage(lease, "compress", 0, {"index": index, "entries": 1}, 1.0)
        return lease


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    home = Home(tmp_path / "home").create()
    place = Place(home, Store.open(home.database))
    for key in (OURS, SHARED, NOBODYS):
        place.make_entry(key)
    for name, entries in (("ours", [OURS, SHARED]), ("other", [SHARED])):
        place.store.release(place.study(name, *entries))
    (home.bank / "aa" / "tmp.part").write_bytes(bytes(10))
    (home.cache / "calibration-x.safetensors").write_bytes(bytes(20))
    (home.cache / "bank-x.json").write_bytes(bytes(30))
    home.log("ours").write_text("said")
    home.spool("ours").mkdir(parents=True)
    (home.spool("ours") / "key.json").write_text("{}")
    yield place
    place.store.close()


def test_delete_takes_what_no_other_study_needs(place: Place) -> None:
    removal = delete(place.home, place.store, "ours")
    assert place.entries() == {SHARED}
    assert removal["removed"]["bank"] == {"count": 2, "bytes": 2000}
    assert removal["bytes"] == sum(amount["bytes"] for amount in removal["removed"].values())
    assert not place.home.log("ours").exists()
    assert [file.name for file in place.home.cache.iterdir()] == ["calibration-x.safetensors"]
    assert (removal["removed"]["spool"]["count"], removal["left"]) == (1, [])


@pytest.mark.parametrize("call", ["delete", "collect"])
def test_dry_run_foresees_and_removes_nothing(place: Place, call: str) -> None:
    before = sorted(place.home.path.rglob("*"))

    def run(dry: bool) -> object:
        if call == "delete":
            return delete(place.home, place.store, "ours", dry_run=dry)["removed"]
        return collect(place.home, place.store, dry_run=dry)["removed"]

    foreseen = run(True)
    assert sorted(place.home.path.rglob("*")) == before
    assert len(place.store.studies()) == 2
    assert run(False) == foreseen


def test_running_study_is_refused_and_told_how_to_stop(place: Place) -> None:
    place.study("busy", NOBODYS)
    with pytest.raises(InvalidInput, match=r"being run by pid .*; stop it first: .* stop busy$"):
        delete(place.home, place.store, "busy")


@pytest.mark.parametrize("call", ["delete", "collect"])
def test_nothing_shared_goes_while_a_study_runs(place: Place, call: str) -> None:
    place.study("busy")  # it has found entries of the bank, and names none yet
    if call == "delete":
        removal = delete(place.home, place.store, "ours")
    else:
        removal = collect(place.home, place.store)
    assert place.entries() == {OURS, SHARED, NOBODYS}
    assert (place.home.cache / "calibration-x.safetensors").exists()
    assert any('"busy" is being run by pid' in line for line in removal["left"])
    assert removal["compacted"] is None


def test_collect_takes_garbage_and_cache_only(place: Place) -> None:
    removal = collect(place.home, place.store)
    assert place.entries() == {OURS, SHARED}
    found = {kind: amount["count"] for kind, amount in removal["removed"].items()}
    assert found == {"bank": 1, "parts": 1, "cache": 2}
    assert list(place.home.cache.iterdir()) == []
    assert place.home.log("ours").exists() and any(place.home.spool("ours").iterdir())
    assert removal["compacted"] is not None


def test_collect_bank_takes_entries_that_no_study_needs_and_nothing_else(place: Place) -> None:
    cached = sorted(place.home.cache.iterdir())
    foreseen = collect_bank(place.home, place.store, dry_run=True)["removed"]
    assert place.entries() == {OURS, SHARED, NOBODYS}
    removal = collect_bank(place.home, place.store)
    assert place.entries() == {OURS, SHARED} and removal["removed"] == foreseen
    assert removal["removed"]["bank"]["count"] == 1
    assert (sorted(place.home.cache.iterdir()), removal["compacted"]) == (cached, None)


def test_collect_bank_takes_nothing_while_a_study_runs(place: Place) -> None:
    place.study("busy")
    removal = collect_bank(place.home, place.store)
    assert place.entries() == {OURS, SHARED, NOBODYS}
    assert any('"busy" is being run by pid' in line for line in removal["left"])


def test_collect_takes_what_a_crash_left_of_a_delete(place: Place) -> None:
    study = place.store.find_study("ours")
    assert study is not None
    place.store.delete_study(study.id)
    collect(place.home, place.store)
    assert place.entries() == {SHARED}
    assert not any(place.home.spool("ours").iterdir())


def test_entries_of_a_study_interrupted_in_compress_stay(place: Place) -> None:
    place.store.release(place.study("interrupted"))
    old = time.time() - 100
    os.utime(place.entry(NOBODYS), (old, old))
    made = "dd" + "0" * 30
    place.make_entry(made)
    os.utime(place.entry(made), (time.time() + 5, time.time() + 5))
    collect(place.home, place.store)
    assert place.entries() == {OURS, SHARED, made}
    delete(place.home, place.store, "interrupted")
    assert place.entries() == {OURS, SHARED}


def test_bank_is_left_to_the_database_of_its_home(place: Place, tmp_path: Path) -> None:
    elsewhere = Home(place.home.path, f"sqlite:///{tmp_path / 'other.db'}")
    store = Store.open(elsewhere.database)
    try:
        store.create_study("far", {}, "hash")
        for removal in (delete(elsewhere, store, "far"), collect(elsewhere, store)):
            assert "another database" in removal["left"][0]
        assert place.entries() == {OURS, SHARED, NOBODYS}
        note_database(elsewhere)
        note_database(elsewhere)
    finally:
        store.close()
    removal = collect(place.home, place.store)
    assert removal["left"][0].count("other.db") == 1
    assert place.entries() == {OURS, SHARED, NOBODYS}


def test_own_database_by_its_address_is_the_home_s_own(place: Place) -> None:
    named = Home(place.home.path, str(place.home.path / "studies.db"))
    note_database(named)
    assert collect(named, place.store)["left"] == []
    assert place.entries() == {OURS, SHARED}


def test_no_database_is_made_to_be_looked_after(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="no studies in"):
        stored(Home(tmp_path))
    assert list(tmp_path.iterdir()) == []
