"""Studies that start from configurations of others."""

import importlib.util
import json
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from apportion.studies.driver import Runner
from apportion.studies.evaluations import Stopped

Journey = Any
ROOT = Path(__file__).parents[2]
NAMES = [*(f"attention.{name}" for name in "qkvo"), "mlp.up", "mlp.down"]
LAYERS = [f"blocks.{number}.{name}" for number in (0, 1) for name in NAMES]
# the second block is stored at 4 bits, in the form of the GGUF toolkit
LEVELS = "\n".join(f"{n}: 8" if ".0." in n else f"{n}: 4.5 (4.5-Q4_K.pth)" for n in LAYERS)
DROPS = "mlp\nnone\n"
OURS = {"configuration": {"blocks.0.mlp.up": "r50%", "blocks.1.mlp": "drop"}}
FILES = {"found/4.5.txt": LEVELS, "found/drops.txt": DROPS, "ours.json": json.dumps(OURS)}
DENSE_BYTES = 4 * (2 * (4 * 64 * 64 + 2 * 64 * 128 + 64 + 128) + 64 * 16 + 16)
ORIGINS = ["start:4.5", "start:drops", "start:ours"]


def starting(journey: Journey, *names: str, files: dict[str, str] = FILES) -> Journey:
    """The study with start configurations."""
    for name, text in files.items():
        (journey.folder / name).parent.mkdir(exist_ok=True)
        (journey.folder / name).write_text(text)
    start = json.dumps(names or list(files))
    journey.edit("study.toml", "[search]", f"[search]\nstart = {start}")
    return journey


def stopped_at(monkeypatch: pytest.MonkeyPatch, call: int) -> Callable[[Journey], None]:
    """Submits a study that is stopped before its evaluations are asked for that often."""

    def submit(journey: Journey) -> None:
        run, calls = Runner.run, []

        def stop(runner: Runner, work: Any) -> Any:
            calls.append(work)
            if len(calls) == call:
                raise Stopped
            return run(runner, work)

        with monkeypatch.context() as patch:
            patch.setattr(Runner, "run", stop)
            journey.submit()
        assert journey.listed()[0]["state"] == "interrupted"

    return submit


@pytest.fixture(scope="module")
def undisturbed(
    files: Path, journey_in: Callable[[Path], Journey], tmp_path_factory: pytest.TempPathFactory
) -> Journey:
    """The study with all three, to its end. Read it only."""
    folder = tmp_path_factory.mktemp("starts")
    shutil.copytree(files, folder / "study")
    journey = starting(journey_in(folder))
    ended = journey.submit()
    assert (ended.status, ended.error) == (0, "")
    return journey


def test_files_of_others_are_the_first_trials(undisturbed: Journey) -> None:
    trials = undisturbed.path()["trials"]
    assert [origin for *_, origin, _ in trials[:3]] == ORIGINS
    assert [(first, windows) for _, _, first, windows, _, _ in trials[:3]] == [(0, 8)] * 3
    levels, drops, ours = (dict(configuration) for _, configuration, *_ in trials[:3])
    assert levels["blocks.0.attention.q+k+v"] == "w8"
    assert levels["blocks.1.mlp.down"] == "w4g32"
    assert {name for name, option in drops.items() if option == "drop"} == {"blocks.0.mlp"}
    assert ours == {**ours, "blocks.0.mlp.up": "r50%", "blocks.1.mlp": "drop"}
    assert sum(option not in ("dense", "keep") for option in ours.values()) == 2


def test_start_outside_of_the_limits_is_scored_and_does_not_win(undisturbed: Journey) -> None:
    report = json.loads(undisturbed.run("show", "tiny", "--json").out)
    winner = next(point for point in report["front"] if point["number"] == report["winner"])
    assert winner["weight_bytes"] <= 0.4 * DENSE_BYTES
    assert winner["origin"] not in ORIGINS[1:]
    told = [note for note in report["notes"] if note.startswith("start:")]
    assert [note.partition(" is trial ")[0] for note in told] == ORIGINS
    assert all(note.endswith(", outside of the limits") for note in told[1:])


def test_stopped_study_goes_on_without_spending_again(
    undisturbed: Journey, journey: Journey, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped_at(monkeypatch, 3)(starting(journey))
    assert journey.run("resume", "tiny").status == 0
    assert journey.path() == undisturbed.path()
    done = sum(entry["executions"] for entry in journey.status()["bill"].values())
    assert done == journey.evaluated() == undisturbed.evaluated()


def test_changed_file_is_named_and_a_lost_one_is_not_missed(
    undisturbed: Journey, journey: Journey, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped_at(monkeypatch, 3)(starting(journey))
    journey.edit("found/drops.txt", "mlp", "attn")
    ended = journey.run("resume", "tiny")
    assert (ended.status, len(ended.error.splitlines())) == (2, 1)
    assert ended.error.startswith("refused: search.start: ")
    assert "found/drops.txt has changed since the study began" in ended.error
    assert journey.listed()[0]["state"] == "interrupted"
    journey.edit("found/drops.txt", "attn", "mlp")
    (journey.folder / "ours.json").unlink()
    assert journey.run("resume", "tiny").status == 0
    assert journey.path() == undisturbed.path()


def test_same_configuration_is_scored_once_and_a_uniform_one_is_uniform(journey: Journey) -> None:
    every = {"every.txt": "\n".join(f"{name}: 4" for name in LAYERS)}
    again = {"a/x.txt": DROPS, "b/x.txt": DROPS}
    ended = starting(journey, files={**again, **every}).submit()
    assert (ended.status, ended.error) == (0, "")
    trials = journey.path()["trials"]
    assert [origin for *_, origin, _ in trials[:2]] == ["start:a/x", "uniform:w4g32"]
    asked = [(dict(c), first, windows) for _, c, first, windows, _, _ in trials]
    assert all(asked.count(one) == 1 for one in asked)


def test_exported_folder_begins_another_study(
    finished: Journey, journey: Journey, tmp_path: Path
) -> None:
    assert finished.run("export", "tiny", "--to", tmp_path / "winner").status == 0
    starting(journey, *(str(tmp_path / "winner" / n) for n in ("apportion.json", "report.json")))
    assert journey.submit().status == 0
    report = json.loads(finished.run("show", "tiny", "--json").out)
    won = next(point for point in report["front"] if point["number"] == report["winner"])
    trials = journey.path()["trials"]
    assert dict(trials[0][1]) == won["configuration"]
    assert not any(origin == "start:report" for *_, origin, _ in trials)


WRONG = {
    "layer": ({"x.txt": "blocks.2.mlp.up: 4"}, 'x.txt: "blocks.2.mlp.up" has a level, but no site'),
    "level": ({"x.txt": "blocks.1.mlp.up: 3"}, "x.txt: blocks.1.mlp.up: level 3 is no option"),
    "option": ({"x.json": '{"blocks.1.mlp.up": "w3"}'}, 'blocks.1.mlp.up has no option "w3"'),
    "both": (
        {"x.txt": "hello", "y.txt": "attn"},
        "x.txt: is no configuration",
    ),
}


@pytest.mark.parametrize(("command", "name"), [*(("check", n) for n in WRONG), ("submit", "level")])
def test_what_the_space_lacks_is_refused_before_a_study_exists(
    journey: Journey, name: str, command: str
) -> None:
    files, words = WRONG[name]
    ended = starting(journey, files=files).run(command, journey.study)
    assert (ended.status, len(ended.error.splitlines())) == (2, len(files))
    assert ended.error.startswith(f"{journey.study}: search.start: {journey.folder}")
    assert words in ended.error
    assert journey.listed() == []


def test_owl_is_refused_where_nothing_differs_in_sparsity(journey: Journey) -> None:
    ended = starting(journey, "owl").run("check", journey.study)
    assert (ended.status, len(ended.error.splitlines())) == (2, 1)
    assert 'search.start: "owl" gives each block a sparsity of its own, but no site' in ended.error


SPARSE = 'options = ["dense", "s42%", "s50%", "s58%", "s50%+w4g32"]'
OUTLIERS = """\
    model = Tiny()
    with torch.no_grad():
        model.blocks[0].mlp.up.weight[:4] *= 20
    return model
"""


@pytest.fixture
def sparse(tmp_path: Path, journey_in: Callable[[Path], Journey]) -> Journey:
    """The study with levels of sparsity, and a first block with outliers."""
    path = ROOT / "benchmarks" / "tiny_study.py"
    specification = importlib.util.spec_from_file_location("tiny_study", path)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    options = tomllib.loads(module.STUDY)["space"][0]["options"]
    module.STUDY = module.STUDY.replace(f"options = {json.dumps(options)}", SPARSE)
    module.STUDY = module.STUDY.replace('"0.4x dense"', '"0.6x dense"')
    module.MODEL = module.MODEL.replace("    return Tiny()\n", OUTLIERS)
    module.write(tmp_path / "study")
    return journey_in(tmp_path)


def test_owl_is_a_start_like_any_other(sparse: Journey, monkeypatch: pytest.MonkeyPatch) -> None:
    starting(sparse, "owl", "drops.txt", files={"drops.txt": DROPS})
    stopped_at(monkeypatch, 2)(sparse)
    assert sparse.run("resume", "tiny").status == 0
    trials = sparse.path()["trials"]
    assert [origin for *_, origin, _ in trials[:4]][-1] == "start:drops"
    owl = {origin: dict(c) for _, c, _, _, origin, _ in trials if origin.startswith("owl:")}
    assert set(owl) == {"owl:s42%", "owl:s50%", "owl:s58%"}
    # two blocks of as many weights: S less and more lambda; the first one's outliers spare it
    for site, option in owl["owl:s50%"].items():
        if option not in ("keep", "drop"):
            assert option == ("s42%" if site.startswith("blocks.0.") else "s58%")


def test_equal_blocks_are_told_of(sparse: Journey, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("apportion.studies.stages.compress.outlier_ratios", lambda *_: {})
    ended = starting(sparse, "owl", files={}).submit()
    assert ended.status == 0 and "it adds no configuration to the uniform ones" in ended.out
    assert not any(origin.startswith("owl:") for *_, origin, _ in sparse.path()["trials"])
