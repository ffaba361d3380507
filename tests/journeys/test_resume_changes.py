"""What `resume` changes of a study: its limits, its budget, its workers."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

Journey = Any


@pytest.fixture
def copied(finished: Journey, tmp_path: Path) -> Journey:
    """The finished study in a home of its own."""
    shutil.copytree(finished.home, tmp_path / "home")
    return replace(finished, home=tmp_path / "home")


def executed(journey: Journey) -> int:
    """Evaluations that the study's workers have done, over all its runs."""
    return int(sum(entry["executions"] for entry in journey.status()["bill"].values()))


def report(journey: Journey) -> Any:
    return json.loads(journey.run("show", "tiny", "--json").out)


def winner(journey: Journey) -> Any:
    found = report(journey)
    return next(point for point in found["front"] if point["number"] == found["winner"])


def test_other_limit_is_a_new_round(copied: Journey) -> None:
    before, at_first = report(copied), executed(copied)
    dense = max(point["weight_bytes"] for point in before["front"])
    with copied.terminal("resume", "tiny", "--limit", "weight_bytes=0.1x") as terminal:
        status, said = terminal.end()
    assert status == 0
    assert "resuming with limits.weight_bytes = 0.1x dense" in said
    assert "weight_bytes <= 0.1x dense" in said and "* chosen" in said
    assert report(copied)["front"] != before["front"]
    assert winner(copied)["weight_bytes"] <= 0.1 * dense
    now = copied.status()
    assert (now["state"], now["changes"]) == ("finished", ["limits.weight_bytes = 0.1x dense"])
    # nothing is done twice: each execution gave an evaluation that was not there
    assert executed(copied) == copied.evaluated() > at_first
    assert now["cached"] > 0
    line = copied.piped("status", "tiny").out
    assert "changed: limits.weight_bytes = 0.1x dense" in line
    assert copied.piped("resume", "tiny").out.startswith(" study tiny is finished; nothing is left")
    assert copied.run("db", "check").status == 0


def test_a_bank_that_is_gone_is_made_again(copied: Journey) -> None:
    entries = {path: path.read_bytes() for path in (copied.home / "bank").rglob("*.safetensors")}
    shutil.rmtree(copied.home / "bank")
    ended = copied.piped("resume", "tiny", "--limit", "weight_bytes=0.1x")
    assert ended.status == 0
    assert "are gone from" in ended.out + ended.error and "made again" in ended.out + ended.error
    assert {path: path.read_bytes() for path in entries} == entries


def test_same_limit_changes_nothing(copied: Journey) -> None:
    before = copied.path()
    ended = copied.piped("resume", "tiny", "--limit", "weight_bytes=0.4x")
    assert (ended.status, "nothing is left to do" in ended.out) == (0, True)
    assert (copied.path(), copied.status()["changes"]) == (before, [])


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("--limit", "weight_bytes=0.000001x"), "limits cannot be met: weight_bytes"),
        (("--limit", "weight_bytes=0.4x", "--limit", "weigh=3"), "limits.weigh: nothing by that"),
        (("--limit", "latency.there=3 ms"), 'limits.latency.there: no device "there"'),
        (("--limit", "weight_bytes=small"), '"small" is no quantity'),
        (("--limit", "weight_bytes"), '--limit weight_bytes: write "--limit latency.here=0.4x"'),
        (("--tokens", "0"), "search.tokens: must be at least 1"),
        (("--tokens", "7"), "search.tokens: 7 is less than one evaluation"),
        (("--workers", "0"), "--workers 0: must be at least 1"),
    ],
)
def test_refused_change_leaves_the_study_as_it_was(
    copied: Journey, words: tuple[str, ...], line: str
) -> None:
    before, status = copied.path(), copied.status()
    ended = copied.piped("resume", "tiny", *words)
    assert (ended.status, len(ended.error.splitlines())) == (2, 1)
    assert line in ended.error
    assert (copied.path(), copied.status()) == (before, status)


def test_more_tokens_go_further(copied: Journey) -> None:
    ended = copied.piped("resume", "tiny", "--tokens", "300")
    assert (ended.status, ended.error) == (0, "")
    assert " resuming with search.tokens = 300\n" in ended.out
    now = copied.status()
    assert (now["tokens"], now["changes"]) == (300, ["search.tokens = 300"])
    assert 200 < now["tokens_spent"] <= 300
    assert executed(copied) == copied.evaluated()


def test_interrupted_change_goes_on_to_the_same_end(copied: Journey, tmp_path: Path) -> None:
    undisturbed = replace(copied, home=tmp_path / "undisturbed")
    shutil.copytree(copied.home, undisturbed.home)
    assert undisturbed.run("resume", "tiny", "--tokens", "400").status == 0
    before = copied.evaluated()
    with copied.process("resume", "tiny", "--tokens", "400") as process:
        copied.until(lambda: copied.evaluated() > before)
        process.kill()
        process.wait()
    assert copied.status()["state"] == "interrupted"
    shown = copied.piped("show", "tiny")
    assert (shown.status, "to go on: apportion" in shown.error) == (2, True)
    assert copied.piped("resume", "tiny").status == 0
    assert copied.status()["changes"] == ["search.tokens = 400"]
    assert copied.path() == undisturbed.path()
    assert report(copied)["front"] == report(undisturbed)["front"]


def test_other_workers_find_the_same(journey: Journey, finished: Journey) -> None:
    with journey.process("submit", journey.study) as process:
        journey.until(lambda: journey.evaluated() > 5)
        process.kill()
        process.wait()
    ended = journey.piped("resume", "tiny", "--workers", "2")
    assert (ended.status, ended.error) == (0, "")
    assert ended.out.startswith(" resuming with 2 workers\n")
    status = journey.status()
    assert (status["workers"], status["changes"]) == (2, ["2 workers"])
    assert journey.path() == finished.path()
    assert journey.nothing_left()
