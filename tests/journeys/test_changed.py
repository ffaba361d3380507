"""A study that finds another model, data or loss stops, says so, and goes on once all is back."""

from typing import Any

import pytest

from apportion.studies.driver import Runner
from apportion.studies.evaluations import Stopped

Journey = Any
LOSS = "def loss(output, batch, reference):\n    return (output - reference).square().mean((1, 2))"
CHANGES = {
    "model": ("model.py", "10 * x", "11 * x", "the model behind"),
    "data": ("data.py", "index(part))", "index(part) + 7)", "data have changed"),
    "loss": ("loss.py", "square()", "abs()", "the code of the loss has changed"),
}


@pytest.fixture
def stopped(journey: Journey, monkeypatch: pytest.MonkeyPatch) -> Journey:
    """A study that was stopped in the middle of its search."""
    journey.folder.joinpath("loss.py").write_text(LOSS + ", output.new_ones(len(output))\n")
    journey.edit("study.toml", "[objective]", '[objective]\nloss = "python:loss.py:loss"')
    run, calls = Runner.run, []

    def stop(runner: Runner, work: Any) -> Any:
        calls.append(work)
        if len(calls) == 4:
            raise Stopped
        return run(runner, work)

    with monkeypatch.context() as patch:
        patch.setattr(Runner, "run", stop)
        journey.submit()
    return journey


@pytest.mark.parametrize("name", CHANGES)
def test_changed_thing_is_named_and_nothing_is_lost(stopped: Journey, name: str) -> None:
    file, old, new, words = CHANGES[name]
    stopped.edit(file, old, new)
    ended = stopped.run("resume", "tiny")
    assert (ended.status, len(ended.error.splitlines())) == (2, 1)
    assert ended.error.startswith("refused: ") and words in ended.error
    assert stopped.listed()[0]["state"] == "interrupted"
    stopped.edit(file, new, old)
    assert stopped.run("resume", "tiny").status == 0
    assert stopped.listed()[0]["state"] == "finished"


def test_change_before_the_first_trial_forgets_nothing(
    journey: Journey, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("apportion.studies.stages.compress.run", _stop)
        journey.submit()
    journey.edit("model.py", "10 * x", "11 * x")
    assert journey.run("resume", "tiny").status == 2
    assert len(journey.listed()) == 1


def _stop(context: Any, space: Any) -> Any:
    raise Stopped
