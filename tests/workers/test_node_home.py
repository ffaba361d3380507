"""What a node of a cluster makes of a driver's specification, and of a bank that it lacks."""

import json
from pathlib import Path

import pytest

from apportion.hashing import file_hash
from apportion.spaces.bank import Bank, NotFetched
from apportion.workers.evaluator import Evaluate, Evaluation
from apportion.workers.node_home import localized
from apportion.workers.pool import attempt
from apportion.workers.spec import WorkerSpec, read_index


def a_key(spec: WorkerSpec) -> str:
    index = read_index(spec)
    return next(key for keys in index.values() for key in keys.values())


def test_node_that_shares_the_drivers_home_uses_its_bank(
    spec: WorkerSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("APPORTION_HOME", raising=False)
    local = localized(spec, None, "abc")
    assert (local["bank"], local["index"]) == (spec["bank"], spec["index"])
    assert local["origin"] == {"node": "abc", "bank": spec["bank"]}


def test_node_with_its_own_home_keeps_bank_and_index_there(
    spec: WorkerSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("APPORTION_HOME", str(tmp_path))
    index = json.dumps({"a": {"w8": "key"}}).encode()
    local = localized(spec, index, "abc")
    assert local["bank"] == str(tmp_path / "bank")
    assert Path(local["index"]).is_relative_to(tmp_path)
    assert read_index(local) == {"a": {"w8": "key"}}
    assert "origin" not in spec


def test_missing_entry_is_fetched_once_and_is_the_same(spec: WorkerSpec, tmp_path: Path) -> None:
    asked: list[str] = []
    there, key = Bank(Path(spec["bank"])), a_key(spec)

    def fetch(key: str) -> tuple[bytes, str]:
        asked.append(key)
        return there.path(key).read_bytes(), file_hash(there.path(key))

    bank = Bank(tmp_path, fetch)
    for _ in range(2):
        assert [m.format for m in bank.get(key).weights] == [
            m.format for m in there.get(key).weights
        ]
    assert asked == [key]
    assert bank.path(key).read_bytes() == there.path(key).read_bytes()


def test_no_configuration_is_blamed_for_an_entry_that_does_not_come(
    spec: WorkerSpec, tmp_path: Path
) -> None:
    def fetch(key: str) -> tuple[bytes, str]:
        raise NotFetched("the driver's node does not give it")

    def evaluate(work: Evaluate) -> Evaluation:
        Bank(tmp_path, fetch).get("key")
        raise AssertionError

    with pytest.raises(NotFetched, match="does not give it"):
        attempt(evaluate, Evaluate({}, "search", 0, 4))


def test_entry_that_is_not_what_was_sent_is_not_kept(tmp_path: Path) -> None:
    bank = Bank(tmp_path, lambda key: (b"half of it", "0" * 32))
    with pytest.raises(NotFetched, match="not what was sent"):
        bank.get("key")
    assert not bank.has("key")
