"""Calibration shared among workers: the files of one process, whatever the model."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch

from apportion.errors import InvalidInput
from apportion.spaces.streaming import Portion, portions
from apportion.studies.calibrating import calibrate, is_shared
from apportion.studies.cli.display import QuietDisplay
from apportion.studies.context import Context, worker_spec
from apportion.studies.database import Store
from apportion.studies.filling import Compressors
from apportion.studies.home import Home
from apportion.studies.specification import StudySpec
from apportion.workers.calibrator import Calibrator, Collect

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

def chain():
    return Net(0)
def skipping():
    return Net(1)
def load(part):
    seed = ("calibration", "search", "heldout").index(part)
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(4, 32, generator=generator) for _ in range(3)]
"""


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Callable[[str], Context]]:
    """A context of a new study of a model."""
    home = Home(tmp_path / "home").create()
    store = Store.open(home.database)
    source = f"python:{tmp_path / 'code.py'}"
    (tmp_path / "code.py").write_text(CODE)
    threads = torch.get_num_threads()

    def build(model: str) -> Context:
        spec = StudySpec(
            study={"name": model},
            model={"source": f"{source}:{model}"},
            data={"source": f"{source}:load"},
            space=[{"sites": ["*"], "options": ["dense", "w8"], "unfit": "skip"}],
            limits={"bits": 5},
        )
        study = store.create_study(model, spec.to_json(), spec.spec_hash).id
        lease = store.acquire(study, 60)
        return Context(spec, home, store, study, lease, QuietDisplay(), Event())

    yield build
    store.close()
    torch.set_num_threads(threads)


class OneByOne(Compressors):
    """A worker of its own, with the dense model of this process."""

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        context.workers = 2
        self.done: list[str | None] = []
        spec = worker_spec(context.spec, context.home)
        self.calibrator = Calibrator(context.setting, spec)

    def do(self, works: Sequence[Any], take: Any, begun: Any = None) -> None:
        for work in works:
            take(work, self.calibrator.collect(work))
            self.done.append(work.step.portion.block)


@pytest.fixture(autouse=True)
def cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("apportion.studies.calibrating.physical_cores", lambda: 2)


def calibrated(context: Context, compressors: Compressors, name: str) -> dict[str | None, bytes]:
    """Block -> what its file holds."""
    space, folder = context.setting.space, context.home.cache
    wanted = portions(space.input_sites, context.setting.blocks)

    def file(portion: Portion) -> Path:
        return folder / f"{name}-{portion.block}.safetensors"

    calibrate(context, compressors, wanted, file)
    return {portion.block: file(portion).read_bytes() for portion in wanted}


@pytest.mark.parametrize("model", ["chain", "skipping"])
def test_two_processes_leave_the_files_of_one(opened: Callable[[str], Context], model: str) -> None:
    context = opened(model)
    alone = calibrated(context, Compressors(context), "alone")
    assert alone.keys() == {"blocks.0", "blocks.1", "blocks.2", None}
    context.workers = 2
    shared = Compressors(context)
    try:
        assert calibrated(context, shared, "shared") == alone
    finally:
        shared.close()


def test_what_workers_leave_of_no_chain_is_collected_in_one_pass(
    opened: Callable[[str], Context],
) -> None:
    context = opened("skipping")
    worker = OneByOne(context)
    found = calibrated(context, worker, "shared")
    context.workers = 1
    assert found == calibrated(context, Compressors(context), "alone")
    assert worker.done == [None, "blocks.0", "blocks.1"]


def test_only_missing_blocks_are_collected_again(opened: Callable[[str], Context]) -> None:
    context = opened("chain")
    whole = calibrated(context, OneByOne(context), "shared")
    for block in ("blocks.0", "blocks.2"):
        (context.home.cache / f"shared-{block}.safetensors").unlink()
    worker = OneByOne(context)
    assert calibrated(context, worker, "shared") == whole
    assert worker.done == ["blocks.0", "blocks.2"]


def test_workers_that_would_take_turns_on_the_processors_share_nothing(
    opened: Callable[[str], Context],
) -> None:
    context = opened("chain")
    assert not is_shared(context)
    context.workers = 2
    assert is_shared(context)
    context.workers = 3
    assert not is_shared(context)


def test_block_that_cannot_be_collected_ends_the_stage_in_its_words(
    opened: Callable[[str], Context],
) -> None:
    context = opened("chain")
    with torch.no_grad():
        context.model.get_submodule("blocks.1.up").weight.fill_(torch.inf)
    with pytest.raises(InvalidInput, match="the inputs of site blocks.1.down are not finite"):
        calibrated(context, Blockwise(context), "shared")
    (context.home.cache / "odd-blocks.0.safetensors").mkdir()
    with pytest.raises(OSError, match="odd-blocks.0"):
        calibrated(context, Blockwise(context), "odd")


class Blockwise(OneByOne):
    """Leaves what is outside of blocks to the end."""

    def do(self, works: Sequence[Any], take: Any, begun: Any = None) -> None:
        def outside(work: Collect) -> bool:
            return work.step.portion.block is None

        super().do(sorted(works, key=outside), take)
