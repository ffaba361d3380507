"""A block's statistics as work: the same bytes from any worker, in any order."""

import errno
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from apportion.errors import InvalidInput
from apportion.spaces.activations import Activations
from apportion.spaces.calibration import Sums
from apportion.spaces.statistics import write_statistics
from apportion.spaces.streaming import Portion, portions, steps, stream
from apportion.workers.calibrator import (
    CALIBRATION_BATCH,
    Calibrator,
    Collect,
    Collected,
    build_compressor,
)
from apportion.workers.ray_pool import RayPool
from apportion.workers.spec import Setting, WorkerSpec, cache_folder, open_setting


@pytest.fixture
def own(spec: WorkerSpec, tmp_path: Path) -> Iterator[WorkerSpec]:
    """A worker's specification with a folder of its own; threads as before at the end."""
    threads = torch.get_num_threads()
    data = spec["data"] | {"tokens": spec["data"]["tokens"] | {"calibration": 640}}
    yield spec | {"data": data, "bank": str(tmp_path / "bank")}
    torch.set_num_threads(threads)


def portions_of(setting: Setting) -> list[Portion]:
    space = setting.space
    return portions(space.input_sites, setting.blocks, space.mean_sites)


def works_of(spec: WorkerSpec, setting: Setting) -> list[Collect]:
    batch = setting.open_part("calibration").chunks(CALIBRATION_BATCH)[0].batch
    folder = cache_folder(spec)
    found = steps(setting.opened.model, setting.blocks, portions_of(setting), batch)
    return [Collect(step, str(folder / f"{step.portion.block}.safetensors")) for step in found]


def alone(setting: Setting, folder: Path) -> dict[str, bytes]:
    """What one process collects in one walk."""
    chunks = setting.open_part("calibration").chunks(CALIBRATION_BATCH)
    assert len(chunks) > 1

    def keep(portion: Portion, sums: Sums) -> None:
        write_statistics(folder / f"{portion.block}.safetensors", sums)

    folder.mkdir()
    model, blocks, wanted = setting.opened.model, setting.blocks, portions_of(setting)
    batches = [chunk.batch for chunk in chunks]
    assert stream(model, blocks, wanted, batches, Activations(folder), keep) is None
    return files(folder)


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}


def test_two_workers_write_the_bytes_of_one_process(own: WorkerSpec, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    setting = open_setting(own)
    works, expected = works_of(own, setting), alone(setting, tmp_path / "alone")
    assert len(works) == len(expected) == 3
    spoiled = cache_folder(own) / "a folder.safetensors"
    spoiled.mkdir(parents=True)
    pool = RayPool(own, workers=2, build=build_compressor)
    try:
        results = [pool.submit(work) for work in (replace(works[1], file=str(spoiled)), *works)]
        failed, *others = [future.result(120) for future in results]
    finally:
        pool.close()
    spoiled.rmdir()
    assert isinstance(failed.error, OSError) and failed.error.errno == errno.EISDIR
    assert failed.failure == str(failed.error)
    assert [result.failure for result in others] == [None] * len(works)
    assert max(result.tokens for result in others) == 640
    assert files(cache_folder(own)) == expected


def test_blocks_in_any_order_have_the_same_bytes(own: WorkerSpec, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    setting = open_setting(own)
    first, second, third = works_of(own, setting)
    calibrator = Calibrator(setting, own)
    for work in (second, third, first, third):
        assert calibrator.collect(work).failure is None
    calibrator.forget()
    assert calibrator.collect(third).failure is None
    assert files(cache_folder(own)) == alone(setting, tmp_path / "alone")


def test_worker_goes_on_after_a_block_that_failed(own: WorkerSpec, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    setting = open_setting(own)
    expected = alone(setting, tmp_path / "alone")
    *_, second, third = works_of(own, setting)
    calibrator = Calibrator(setting, own)
    assert calibrator.collect(second).failure is None
    odd = replace(third, step=replace(third.step, expected="of other data"))
    assert calibrator.collect(odd).no_chain == (
        "block model.layers.2 depends on more than the block before"
    )
    assert calibrator.collect(third).failure is None
    found = files(cache_folder(own))
    assert found.items() <= expected.items() and len(found) == 2


def test_inputs_that_are_not_finite_are_told_in_the_users_words(own: WorkerSpec) -> None:
    setting = open_setting(own)
    with torch.no_grad():
        setting.opened.model.get_submodule("model.layers.1.mlp.up_proj").weight.fill_(torch.inf)
    result = Calibrator(setting, own).collect(works_of(own, setting)[1])
    assert isinstance(result.error, InvalidInput)
    assert result.failure == "data.calibration: what model.layers.1 adds is not finite"
    assert not files(cache_folder(own))


def test_block_whose_workers_all_die_is_named(own: WorkerSpec) -> None:
    first, *_ = works_of(own, open_setting(own))
    outside = replace(first, step=replace(first.step, portion=Portion(None, ())))
    told = "its worker died of it twice"
    assert first.failed(told, 1.0, "died") == Collected(
        1.0, f"block model.layers.0 is not calibrated: {told}"
    )
    assert outside.failed(told, 1.0, "died").failure == (
        f"what lies outside of blocks is not calibrated: {told}"
    )
