"""Calibrate and compress: the bank of an ordinary pass, from files of one block each."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Event

import pytest
import torch

from apportion.hashing import tensors_hash
from apportion.spaces.apply import member_weight
from apportion.spaces.bank import entry_key
from apportion.spaces.calibration import collect
from apportion.spaces.compressors.compose import InputStatistics, realize
from apportion.spaces.statistics import StatisticsFiles
from apportion.studies.cli.display import QuietDisplay, QuietStage, Stage
from apportion.studies.context import RANK_MULTIPLE, Context
from apportion.studies.database import Store
from apportion.studies.evaluations import Stopped
from apportion.studies.home import Home
from apportion.studies.preparation import disk
from apportion.studies.specification import StudySpec
from apportion.studies.stages import compress

CODE = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)
    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))

class Net(nn.Module):
    def __init__(self, skip):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head, self.skip = nn.Linear(32, 8), skip
    def forward(self, x):
        first = self.blocks[0](x)
        last = self.blocks[1](first)
        return self.head(self.blocks[2](last + self.skip * first))

class Experts(nn.Module):
    # Adds what one expert of a stack gives of a token; none is sent to the last.
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 32, 32) / 8)
    def forward(self, x):
        chosen, output = (x[:, 0] > 0).long(), x.clone()
        for place in chosen.unique():
            output[chosen == place] += x[chosen == place] @ self.weight[place]
        return output

def mixture():
    return nn.Sequential(Experts(), Experts())
def chain():
    return Net(0)
def skipping():
    return Net(1)
def load(part):
    seed = ("calibration", "search", "heldout").index(part)
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(4, 32, generator=generator) for _ in range(3)]
"""
OPTIONS = ("dense", "w8", "w4g32", "r50%")


class Recording(QuietDisplay):
    """Keeps how stages end; sets `stop` when calibration has made `stop_at` passes."""

    def __init__(self) -> None:
        self.ends: dict[str, str] = {}
        self.told: list[tuple[float, float]] = []
        self.warnings: list[str] = []
        self.stop, self.stop_at = Event(), 0

    def warning(self, text: str) -> None:
        self.warnings.append(text)

    @contextmanager
    def stage(self, name: str) -> Iterator[Stage]:
        display = self

        class Recorded(QuietStage):
            def update(self, done: float, total: float, text: str = "") -> None:
                if name == "calibrate":
                    display.told.append((done, total))
                    if done == display.stop_at:
                        display.stop.set()

            def end(self, text: str) -> None:
                display.ends[name] = text

        yield Recorded()


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Callable[[str], Context]]:
    """A context of a new study of a model, in one home for all."""
    home = Home(tmp_path / "home").create()
    store = Store.open(home.database)
    (tmp_path / "code.py").write_text(CODE)
    threads = torch.get_num_threads()

    def build(model: str = "chain", options: tuple[str, ...] = OPTIONS) -> Context:
        name = f"study{len(store.studies())}"
        source = f"python:{tmp_path / 'code.py'}"
        spec = StudySpec(
            study={"name": name},
            model={"source": f"{source}:{model}"},
            data={"source": f"{source}:load"},
            space=[{"sites": ["*"], "options": list(options), "unfit": "skip"}],
            limits={"bits": 5},
        )
        study = store.create_study(name, spec.to_json(), spec.spec_hash).id
        display = Recording()
        lease = store.acquire(study, 60)
        return Context(spec, home, store, study, lease, display, display.stop)

    yield build
    store.close()
    torch.set_num_threads(threads)


def files(context: Context) -> dict[str, bytes]:
    cache = context.home.cache
    assert all(file.suffix == ".safetensors" for file in cache.iterdir())
    return {file.name: file.read_bytes() for file in cache.iterdir()}


def recording(context: Context) -> Recording:
    assert isinstance(context.display, Recording)
    return context.display


@pytest.mark.parametrize("model", ["chain", "skipping"])
def test_bank_is_that_of_an_ordinary_pass(opened: Callable[[str], Context], model: str) -> None:
    context = opened(model)
    space = context.setting.space
    output = compress.run(context, space)
    batches = [chunk.batch for chunk in context.samples("calibration").chunks(16)]
    sums = collect(context.model, space.sites, batches)
    assert len(sums) == len(output["index"]) == 7
    for place in space.weight_sites:
        (member,), found = space.sites[place].members, sums[space.sites[place].name]
        weight = member_weight(context.model, member)
        weights = tensors_hash({member.module: weight})
        statistics = tensors_hash({"m": found.second_moment, "n": torch.tensor(found.tokens)})
        for option in space.options[place][1:]:
            hashed = statistics if option.needs_statistics else None
            key = entry_key(weights, option, hashed, "float32", RANK_MULTIPLE)
            assert output["index"][space.sites[place].name][str(option)] == key
            (stored,) = context.bank.get(key).weights
            expected = realize(weight, member.shape, option, found, "float32", RANK_MULTIPLE)
            assert tensors_hash(stored.tensors) == tensors_hash(expected.tensors)


def test_finished_calibration_is_not_made_again(opened: Callable[[str], Context]) -> None:
    first, second = opened("chain"), opened("chain")
    before = compress.run(first, first.setting.space)
    written = files(first)
    # Three blocks, and the head outside of them.
    assert len(written) == 4
    assert recording(first).ends["calibrate"] == "12 rows"
    assert recording(first).told[-1] == (12, 12)
    assert compress.run(second, second.setting.space) == before
    assert files(second) == written and "calibrate" not in recording(second).ends


def test_stopped_calibration_goes_on_with_the_next_block(opened: Callable[[str], Context]) -> None:
    context, again = opened("chain"), opened("chain")
    recording(context).stop_at = 8
    with pytest.raises(Stopped):
        compress.run(context, context.setting.space)
    whole = files(context)
    assert len(whole) == 2
    compress.run(again, again.setting.space)
    # The last block and the head were left, three batches each.
    assert recording(again).told[-1] == (6, 6)
    resumed = files(again)
    assert whole.items() <= resumed.items()
    for file in again.home.cache.iterdir():
        file.unlink()
    undisturbed = opened("chain")
    compress.run(undisturbed, undisturbed.setting.space)
    assert files(undisturbed) == resumed


def test_lost_block_is_collected_again_alone(opened: Callable[[str], Context]) -> None:
    context, again = opened("chain"), opened("chain")
    compress.run(context, context.setting.space)
    written = files(context)
    for lost in written:
        (context.home.cache / lost).unlink()
        recording(again).told.clear()
        compress.run(again, again.setting.space)
        assert files(again) == written
        assert recording(again).told[-1] == (3, 3)


def test_model_that_is_no_chain_is_told(opened: Callable[[str], Context]) -> None:
    context = opened("skipping")
    compress.run(context, context.setting.space)
    assert recording(context).ends["calibrate"] == (
        "12 rows, all blocks at once: block blocks.2 depends on more than the block before"
    )
    assert len(files(context)) == 4


def test_experts_in_a_stack_have_methods_that_need_their_tokens(
    opened: Callable[..., Context],
) -> None:
    context = opened("mixture", ("w3g16:gptq", "s50%:wanda", "s50%:sparsegpt+w4"))
    space = context.setting.space
    assert space.texts == (("dense", "w3g16:gptq", "s50%:wanda", "s50%:sparsegpt+w4"),) * 2
    output = compress.run(context, space)
    index = output["index"]
    batches = [chunk.batch for chunk in context.samples("calibration").chunks(16)]
    sums = collect(context.model, space.sites, batches)
    assert sum(sums[f"1.weight.{place}"].tokens for place in range(3)) == 12
    size = sum(found.second_moment.nbytes for found in sums.values())
    assert disk(context.setting, context.home)["parts"]["cache"] == size
    for place, site in enumerate(space.sites):
        for option in space.options[place][1:]:
            stored = context.bank.get(index[site.name][str(option)]).weights
            for member, found in zip(site.members, stored, strict=True):
                weight, seen = member_weight(context.model, member), sums[member.path]
                made = realize(weight, member.shape, option, seen, "float32", RANK_MULTIPLE)
                assert tensors_hash(found.tensors) == tensors_hash(made.tensors)
    (told,) = recording(context).warnings
    assert "weight sites are degenerate, 0.weight.2 for one: no calibration data entered it" in told
    assert output["unreached"] == ["0.weight.2", "1.weight.2"]


def test_range_of_inputs_names_no_entry_but_those_with_a_fixed_scale(
    opened: Callable[..., Context], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("w8", "w8a8", "w8a8s", "s50%")
    index = compress.run(first := opened("chain", options), first.setting.space)["index"]
    others = compress.run(less := opened("chain", ("w8", "s50%")), less.setting.space)["index"]

    def wider(files: StatisticsFiles, site: str) -> InputStatistics | None:
        found = of(files, site)
        return found and replace(found, peak=2 * found.peak)

    of = StatisticsFiles.of
    monkeypatch.setattr(StatisticsFiles, "of", wider)
    again = compress.run(second := opened("chain", options), second.setting.space)["index"]
    for site, keys in index.items():
        changed = [text for text in keys if keys[text] != again[site][text]]
        assert changed == ["w8a8s"] and len(keys) == 4
        assert {text: keys[text] for text in others[site]} == others[site]


def test_mean_of_what_blocks_add_is_in_the_bank_beside_what_there_was(
    opened: Callable[..., Context],
) -> None:
    before = compress.run(plain := opened("chain"), plain.setting.space)["index"]
    context = opened("chain", (*OPTIONS, "drop", "drop:mean", "c50%"))
    space = context.setting.space
    index = compress.run(context, space)["index"]
    batches = [chunk.batch for chunk in context.samples("calibration").chunks(16)]
    sums = collect(context.model, [], batches, added=space.mean_sites)
    assert {name: index[name] for name in before} == before
    for site in space.mean_sites:
        assert index[site.name].keys() == {"drop:mean", "c50%"}
        stored = context.bank.get(index[site.name]["drop:mean"])
        assert torch.equal(stored.constant, sums[site.name].mean(torch.float32))
    lost = context.bank.path(index["blocks.1"]["drop:mean"])
    content = lost.read_bytes()
    lost.unlink()
    compress.restore(context, space, index)
    assert lost.read_bytes() == content
    alone = opened("chain", ("keep", "drop:mean"))
    expected = {site.name: index[site.name]["drop:mean"] for site in space.mean_sites}
    made = compress.run(alone, alone.setting.space)["index"]
    assert {name: keys["drop:mean"] for name, keys in made.items()} == expected
