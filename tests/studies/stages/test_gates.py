"""Scores of gates in a study: one file, made only where asked for, and part of entries' names."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event

import pytest
import torch

from apportion.errors import InvalidInput
from apportion.hashing import tensors_hash
from apportion.spaces.apply import member_weight
from apportion.spaces.calibration import collect
from apportion.spaces.compressors.treatment import realize_treatment
from apportion.spaces.gates import gate_scores
from apportion.spaces.grammar import parse_option
from apportion.studies.cli.display import QuietDisplay, QuietStage, Stage
from apportion.studies.context import RANK_MULTIPLE, Context
from apportion.studies.database import Store
from apportion.studies.evaluations import Stopped
from apportion.studies.home import Home
from apportion.studies.preparation import prepare
from apportion.studies.specification import StudySpec
from apportion.studies.stages import compress

CODE = """
import torch
from torch import nn

class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
    def forward(self, x):
        return self.down(torch.relu(self.up(x)))

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp = Mlp()
    def forward(self, x):
        return x + self.mlp(x)

class Net(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(16, classes)
    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)

def build():
    return Net(8)
def regression():
    return Net(1)
def load(part):
    seed = ("calibration", "search", "heldout").index(part)
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(4, 16, generator=generator) for _ in range(3)]
"""
PLAIN = ("keep", "c50%", "c50%:magnitude")
TAYLOR = (*PLAIN, "c50%:taylor", "c25%:taylor+w4g8")
Open = Callable[..., Context]


class Recording(QuietDisplay):
    """Keeps how stages end; sets `stop` at the second backward pass, where asked to."""

    def __init__(self) -> None:
        self.ends: list[tuple[str, str]] = []
        self.stop, self.stops = Event(), False

    @contextmanager
    def stage(self, name: str) -> Iterator[Stage]:
        display = self

        class Recorded(QuietStage):
            def update(self, done: float, total: float, text: str = "") -> None:
                # Two blocks are six passes over three batches, gradients are three.
                if display.stops and (done, total) == (2, 3):
                    display.stop.set()

            def end(self, text: str) -> None:
                display.ends.append((name, text))

        yield Recorded()


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Open]:
    """A context of a new study of a model, in one home for all."""
    home = Home(tmp_path / "home").create()
    store = Store.open(home.database)
    (tmp_path / "code.py").write_text(CODE)
    threads = torch.get_num_threads()

    def build(options: tuple[str, ...], model: str = "build") -> Context:
        torch.manual_seed(0)
        name, source = f"study{len(store.studies())}", f"python:{tmp_path / 'code.py'}"
        spec = StudySpec(
            study={"name": name},
            model={"source": f"{source}:{model}"},
            data={"source": f"{source}:load"},
            space=[{"sites": ["mlp:*"], "options": list(options)}],
            limits={"bits": 40},
        )
        study = store.create_study(name, spec.to_json(), spec.spec_hash).id
        display = Recording()
        return Context(spec, home, store, study, store.acquire(study, 60), display, display.stop)

    yield build
    store.close()
    torch.set_num_threads(threads)


def recording(context: Context) -> Recording:
    assert isinstance(context.display, Recording)
    return context.display


def gates(context: Context) -> list[Path]:
    return list(context.home.cache.glob("gates-*"))


def batches(context: Context) -> list[torch.Tensor]:
    return [chunk.batch for chunk in context.samples("calibration").chunks(4)]  # type: ignore[misc]


def test_gradients_are_taken_once_and_only_where_an_option_asks_for_them(opened: Open) -> None:
    plain, first, again = opened(PLAIN), opened(TAYLOR), opened(TAYLOR)
    before = compress.run(plain, plain.setting.space)["index"]
    assert gates(plain) == []
    index = compress.run(first, first.setting.space)["index"]
    (file,) = gates(first)
    written = file.stat().st_mtime_ns
    told = ("calibrate", "gradients of 2 sub-blocks on 12 windows")
    assert told in recording(first).ends and told not in recording(plain).ends
    assert compress.run(again, again.setting.space)["index"] == index
    assert gates(again) == [file] and file.stat().st_mtime_ns == written
    assert "calibrate" not in dict(recording(again).ends)
    for name, keys in before.items():
        assert keys == {text: index[name][text] for text in keys}


def test_entries_are_those_of_the_scores(opened: Open) -> None:
    context = opened(TAYLOR)
    space = context.setting.space
    index = compress.run(context, space)["index"]
    scores = gate_scores(context.model, space.gated_sites, batches(context))
    sums = collect(context.model, space.input_sites, batches(context))
    for site in space.gated_sites:
        assert site.width is not None
        weights = [member_weight(context.model, m).float() for g in site.groups for m in g]
        found = [sums[name] for name in site.input_names]
        for text in TAYLOR[3:]:
            option = parse_option(text)
            made = realize_treatment(
                weights, site.width, option, found, "float32", RANK_MULTIPLE, scores[site.name]
            )
            stored = context.bank.get(index[site.name][text])
            assert stored.kept == made.kept
            stay = scores[site.name].argsort()[-len(made.kept or ()) :]
            assert stored.kept == tuple(sorted(stay.tolist()))
            for one, other in zip(stored.weights, made.weights, strict=True):
                assert tensors_hash(one.tensors) == tensors_hash(other.tensors)


def test_entries_of_other_scores_have_other_names(
    opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = compress.run(first := opened(TAYLOR), first.setting.space)["index"]
    # As if another version took other gradients.
    monkeypatch.setattr("apportion.spaces.gates.own_losses", lambda s, n: s.square().sum((1, 2)))
    gates(first)[0].unlink()
    other = compress.run(second := opened(TAYLOR), second.setting.space)["index"]
    for name, keys in index.items():
        same = {text for text, key in keys.items() if other[name][text] == key}
        assert same == {"c50%", "c50%:magnitude"}


def test_stopped_gradients_leave_no_file_and_are_taken_again(opened: Open) -> None:
    context, again = opened(TAYLOR), opened(TAYLOR)
    recording(context).stops = True
    with pytest.raises(Stopped):
        compress.run(context, context.setting.space)
    assert gates(context) == []
    compress.run(again, again.setting.space)
    assert len(gates(again)) == 1


def test_lost_entry_is_made_again_from_the_same_scores(opened: Open) -> None:
    context = opened(TAYLOR)
    space = context.setting.space
    index = compress.run(context, space)["index"]
    lost = context.bank.path(index["blocks.1.mlp"]["c50%:taylor"])
    content = lost.read_bytes()
    for file in (lost, *gates(context)):
        file.unlink()
    compress.restore(context, space, index)
    assert lost.read_bytes() == content


def test_model_without_class_scores_is_refused_before_any_work(opened: Open) -> None:
    context = opened(TAYLOR, "regression")
    with pytest.raises(InvalidInput, match="taylor takes the model's class scores"):
        prepare(context.spec, context.home, 1, context.display)
