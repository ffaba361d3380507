"""The bank's entries as work: the same bytes from any worker, and whole ones only."""

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest
import torch

from apportion.errors import InvalidInput
from apportion.hashing import content_hash
from apportion.spaces.bank import Bank
from apportion.spaces.calibration import collect
from apportion.spaces.grammar import parse_option
from apportion.spaces.realization import realize_site
from apportion.spaces.statistics import StatisticsFiles, write_statistics
from apportion.workers.calibrator import build_compressor
from apportion.workers.pool import InProcessPool, Pool
from apportion.workers.ray_pool import RayPool
from apportion.workers.realizer import Realize, Realizer
from apportion.workers.spec import WorkerSpec, open_setting

OPTIONS = "w4g32 w4g32:hqq w3g32:gptq s50%:sparsegpt r50% s50%:sparsegpt+w4g32:gptq w3+r4".split()
Descendants = Callable[[int], set[int]]


@pytest.fixture
def own(spec: WorkerSpec, tmp_path: Path) -> Iterator[WorkerSpec]:
    """A worker's specification with an empty bank; threads as before at the end."""
    threads = torch.get_num_threads()
    space = [[["*.self_attn.*", "*.mlp.*"], ["dense", *OPTIONS], True]]
    yield spec | {"bank": str(tmp_path / "bank"), "index": "", "space": space}
    torch.set_num_threads(threads)


def works_of(spec: WorkerSpec, folder: Path) -> list[Realize]:
    """Every option of every site, with the statistics of all in one file."""
    setting = open_setting(spec)
    space = setting.space
    sites = [space.sites[place] for place in space.weight_sites]
    batches = [chunk.batch for chunk in setting.open_part("calibration").chunks(4)]
    file = folder / "statistics.safetensors"
    write_statistics(file, collect(setting.opened.model, sites, batches))
    return [
        Realize(
            space.sites[place].name,
            {o: content_hash([place, o]) for o in space.texts[place][1:]},
            str(file),
        )
        for place in space.weight_sites
    ]


def fill(pool: Pool, works: list[Realize]) -> None:
    try:
        for future in [pool.submit(work) for work in works]:
            assert future.result(120).failure is None
    finally:
        pool.close()


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def by_hand(spec: WorkerSpec, works: list[Realize], folder: Path) -> dict[str, bytes]:
    """The bank that `realize_site` gives, entry by entry, each from statistics read anew."""
    torch.set_num_threads(spec["threads"])
    setting, bank = open_setting(spec), Bank(folder)
    sites = {site.name: site for site in setting.space.sites}
    for work in works:
        for text, key in work.keys.items():
            seen = StatisticsFiles({work.site: Path(work.statistics)})
            site, option = sites[work.site], parse_option(text)
            bank.put(key, realize_site(setting.opened.model, site, option, seen, "float32", 8))
    return files(folder)


@pytest.mark.parametrize("threads", [1, 2])
def test_any_number_of_workers_writes_the_same_bytes(
    own: WorkerSpec, tmp_path: Path, threads: int
) -> None:
    own["threads"] = threads
    works = works_of(own, tmp_path)
    expected = by_hand(own, works, tmp_path / "by hand")
    assert len(expected) == sum(len(work.keys) for work in works) > 60
    alone = own | {"bank": str(tmp_path / "alone")}
    fill(InProcessPool(Realizer(open_setting(alone), alone).realize), works)
    assert files(tmp_path / "alone") == expected
    fill(RayPool(own, workers=2, build=build_compressor), works)
    assert files(tmp_path / "bank") == expected


def test_killed_worker_takes_no_entry_with_it(
    own: WorkerSpec, tmp_path: Path, descendants: Descendants
) -> None:
    works = works_of(own, tmp_path)
    expected = by_hand(own, works, tmp_path / "by hand")
    pipe, pool = tmp_path / "pipe", RayPool(own, workers=2, build=build_compressor)
    os.mkfifo(pipe)  # who reads it waits
    try:
        futures = [pool.submit(work) for work in works[1:]]
        for future in futures:
            future.result(60)
        before = files(tmp_path / "bank")
        hanging = pool.submit(replace(works[0], statistics=str(pipe)))
        worker = until(lambda: busy(descendants))
        (tmp_path / "statistics.safetensors").rename(tmp_path / "moved")
        pipe.unlink()
        (tmp_path / "moved").rename(pipe)
        worker.kill()
        assert hanging.result(60).failure is None
        assert pool.recoveries == 1
    finally:
        pool.close()
    assert before.items() <= files(tmp_path / "bank").items()
    assert files(tmp_path / "bank") == expected


def busy(descendants: Descendants) -> "psutil.Process | None":
    for process in map(psutil.Process, descendants(os.getpid())):
        if process.cmdline()[:1] == ["ray::EvaluatorActor.run"]:
            return process
    return None


def until(found: "Callable[[], psutil.Process | None]") -> psutil.Process:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if (process := found()) is not None:
            return process
        time.sleep(0.02)
    raise AssertionError("waited in vain")


def test_entries_that_are_there_are_not_made_again(own: WorkerSpec, tmp_path: Path) -> None:
    work = works_of(own, tmp_path)[0]
    realizer, bank = Realizer(open_setting(own), own), Bank(tmp_path / "bank")
    assert realizer.realize(work).failure is None
    lost, *others = work.keys.values()
    bank.path(lost).unlink()
    written = {key: bank.path(key).stat().st_mtime_ns for key in others}
    assert realizer.realize(work).failure is None
    assert bank.has(lost)
    assert {key: bank.path(key).stat().st_mtime_ns for key in others} == written


def test_asked_to_stop_no_entry_is_begun(own: WorkerSpec, tmp_path: Path) -> None:
    work, bank = works_of(own, tmp_path)[0], Bank(tmp_path / "bank")

    def stopped() -> bool:
        return len(files(bank.folder)) == 2

    assert Realizer(open_setting(own), own, stopped).realize(work).failure == "stopped"
    made = files(bank.folder)
    assert len(made) == 2
    assert all(bank.get(Path(name).stem) for name in made)


@pytest.mark.parametrize("pool", ["in process", "ray"])
def test_what_is_wrong_comes_back_in_the_users_words(
    own: WorkerSpec, tmp_path: Path, pool: str
) -> None:
    work = works_of(own, tmp_path)[0]
    seen = StatisticsFiles({work.site: Path(work.statistics)}).of(work.site)
    assert seen is not None
    moment = torch.full_like(seen.second_moment, torch.nan)
    write_statistics(tmp_path / "nan", {work.site: replace(seen, second_moment=moment)})
    made: Pool
    if pool == "ray":
        made = RayPool(own, workers=1, build=build_compressor)
    else:
        made = InProcessPool(Realizer(open_setting(own), own).realize)
    result = made.submit(replace(work, statistics=str(tmp_path / "nan"))).result(60)
    made.close()
    assert isinstance(result.error, InvalidInput)
    assert str(result.error).startswith("calibration inputs hold values that are not finite")
    assert not files(tmp_path / "bank")


def test_site_whose_workers_all_die_is_named() -> None:
    work = Realize("model.up", {"w4": "key"}, "file")
    result = work.failed("its worker died of it twice", 1.0, "died")
    assert result.failure == "model.up is not compressed: its worker died of it twice"
    assert (result.error, result.seconds) == (None, 1.0)
