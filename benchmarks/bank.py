"""Is the bank as small as what it stores, built in little memory, and by two workers twice as fast?

Formula.     size = bytes of the entries' files / bytes of the tensors in them. memory = the most
             that is allocated at once while a site's entries are made / bytes of the second moments
             of the largest block's sites, float64. speed = seconds of one worker / seconds of two,
             from the first work handed out to the last entry written; means of both orders (one,
             two, two, one), the workers started and their models opened before.
Assumptions. 12 options at every site: bits (rounded, HQQ, GPTQ, with outliers), sparsity (Wanda,
             SparseGPT, n:m), rank, and composed ones. One thread a worker. Allocated: torch's
             tensors and the workspaces of its linear algebra, as torch's profiler counts them, plus
             the most that Python and numpy held at once (tracemalloc), in another run: so an upper
             bound. Neither the model nor the statistics are in it: these are mapped files, of which
             the system keeps what it has room for.
             Size and memory are the shipped model's. It takes too little time for the speed, which
             is that of a wide one with random weights (`wide_model.py`).
Ceiling.     Speed: 2, less what the last site makes the other worker wait; memory bandwidth, which
             both share, takes more.

Run: .venv/bin/python benchmarks/bank.py, on a quiet machine with two free cores: about 10 minutes.
"""

import math
import os
import shutil
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _report import HERE, ROOT, Claim, at_least, at_most, table, write
from torch.profiler import ProfilerActivity, profile

from apportion.hashing import content_hash
from apportion.spaces.bank import Bank
from apportion.spaces.calibration import collect
from apportion.spaces.compressors.compose import RANK_MULTIPLE
from apportion.spaces.sites import Site
from apportion.spaces.space import DENSE
from apportion.spaces.statistics import read_statistics, write_statistics
from apportion.spaces.streaming import Portion, portions
from apportion.studies.specification import load
from apportion.workers.calibrator import build_compressor
from apportion.workers.device_lock import processor_lock
from apportion.workers.patience import Patience
from apportion.workers.processes import THREAD_VARIABLES
from apportion.workers.ray_pool import RayPool
from apportion.workers.realizer import Realize, Realizer
from apportion.workers.spec import Setting, WorkerSpec, open_setting

STUDY_FILE = ROOT / "examples" / "demo" / "study.toml"
SITES = ["*.self_attn.*", "*.mlp.*"]
OPTIONS = """w8 w4g64 w4g64:hqq w3g64:gptq w3g64+o1% s50% s60%:sparsegpt 2:4:sparsegpt r50% w3g64+r8
s50%+w4g64 s50%:sparsegpt+w4g64:gptq""".split()
THREADS = 1
LEAST_SECONDS = 60.0
SIZE, MEMORY, SPEED = 1.05, 1.5, 1.7
Row = dict[str, Any]


class Build:
    """A bank to be filled.

    Attributes:
        spec: of its workers.
        works: all its entries, the most work first.
        block_bytes: of the statistics of the block that has most.
    """

    def __init__(self, spec: WorkerSpec) -> None:
        """Collects the statistics."""
        self.spec = spec
        self.bank = Bank(Path(spec["bank"]))
        self.setting: Setting = open_setting(spec)
        sites = [self.setting.space.sites[p] for p in self.setting.space.weight_sites]
        chunks = self.setting.open_part("calibration").chunks(spec["batch"])
        sums = collect(self.setting.opened.model, sites, [chunk.batch for chunk in chunks])
        self.works: list[Realize] = []
        self.block_bytes = 0
        for number, portion in enumerate(portions(sites, self.setting.blocks)):
            file = self.bank.folder.with_name(f"statistics-{number}.safetensors")
            write_statistics(file, {site.name: sums[site.name] for site in portion.sites})
            self.works += [self._work(site, file) for site in portion.sites]
            self.block_bytes = max(self.block_bytes, statistics_bytes(portion, file))
        weights = {site.name: sum(m.shape.weights for m in site.members) for site in sites}
        self.works.sort(key=lambda work: weights[work.site], reverse=True)

    def _work(self, site: Site, file: Path) -> Realize:
        return Realize(site.name, {o: content_hash([site.name, o]) for o in OPTIONS}, str(file))

    def here(self) -> Iterator[Callable[[], None]]:
        """What makes the entries of each work, in this process, in an empty bank."""
        shutil.rmtree(self.bank.folder, ignore_errors=True)
        realizer = Realizer(self.setting, self.spec)
        for work in self.works:
            yield partial(_realize, realizer, work)

    def by(self, workers: int) -> float:
        """Seconds that so many workers take to fill an empty bank."""
        shutil.rmtree(self.bank.folder, ignore_errors=True)
        patience = Patience(floor_seconds=math.inf)
        pool = RayPool(self.spec, workers, build=build_compressor, patience=patience)
        try:
            began = time.perf_counter()
            for future in [pool.submit(work) for work in self.works]:
                checked(future.result().failure)
            return time.perf_counter() - began
        finally:
            pool.close()


def _realize(realizer: Realizer, work: Realize) -> None:
    checked(realizer.realize(work).failure)


def checked(failure: str | None) -> None:
    """Ends the benchmark at a failure."""
    if failure is not None:
        raise SystemExit(failure)


def statistics_bytes(portion: Portion, file: Path) -> int:
    """Of the second moments of a block's sites."""
    found = [read_statistics(file, site.name) for site in portion.sites]
    return sum(each.second_moment.nbytes for each in found if each is not None)


def allocated_bytes(run: Callable[[], None]) -> int:
    """The most that torch had allocated at once while this ran, beyond what it had before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        run()
    tree = found.profiler.kineto_results.experimental_event_tree()
    changes = sorted(_allocations(tree))
    held = most = 0
    for _, change in changes:
        held += change
        most = max(most, held)
    return most


def _allocations(tree: Iterable[Any]) -> Iterator[tuple[int, int]]:
    """When how many bytes were taken, or given back (less than 0)."""
    for event in tree:
        if type(event.extra_fields).__name__.endswith("Allocation"):
            yield event.start_time_ns, event.extra_fields.alloc_size
        yield from _allocations(event.children)


def python_bytes(run: Callable[[], None]) -> int:
    """The most that Python and numpy had allocated at once while this ran."""
    tracemalloc.start()
    run()
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return most


def specification(folder: Path, source: str, dtype: str, data: Row, base: Path) -> WorkerSpec:
    """Of a worker that fills the bank in `folder`."""
    return WorkerSpec(
        source=source,
        dtype=dtype,
        trust_remote_code=False,
        data=data,
        seed=0,
        objective="kl",
        threads=THREADS,
        batch=16,
        space=[[SITES, [DENSE, *OPTIONS]]],
        rank_multiple=RANK_MULTIPLE,
        bank=str(folder / "bank"),
        index="",
        base=str(base),
        budgets={},
    )


def shipped(folder: Path) -> Build:
    """The demo's model and data."""
    study = load(STUDY_FILE)
    data = study.data.model_dump(mode="json", exclude_none=True)
    return Build(specification(folder, study.model.source, study.model.dtype, data, ROOT))


def wide(folder: Path) -> Build:
    """The wide model."""
    data = {"source": "python:wide_model.py:windows"}
    return Build(specification(folder, "python:wide_model.py:build", "float32", data, HERE))


def size_and_memory(build: Build) -> list[Row]:
    """A row for each site."""
    allocated = [
        allocated_bytes(run) - allocated_bytes(partial(_read, work))  # that is the mapped file
        for work, run in zip(build.works, build.here(), strict=True)
    ]
    python = [python_bytes(run) for run in build.here()]
    return [
        {
            "kind": "site",
            "site": work.site,
            "allocated_bytes": torch_bytes,
            "python_bytes": other,
            "memory": (torch_bytes + other) / build.block_bytes,
            "file_bytes": sum(build.bank.bytes(key) for key in work.keys.values()),
            "stored_bytes": sum(stored_bytes(build.bank, key) for key in work.keys.values()),
        }
        for work, torch_bytes, other in zip(build.works, allocated, python, strict=True)
    ]


def _read(work: Realize) -> None:
    read_statistics(Path(work.statistics), work.site)


def stored_bytes(bank: Bank, key: str) -> int:
    """Of the tensors of an entry."""
    return sum(t.nbytes for member in bank.get(key).weights for t in member.tensors.values())


def speed(build: Build) -> list[Row]:
    """A row for each build."""
    rows = []
    for workers in (1, 2, 2, 1):
        with processor_lock().exclusive(lambda: None):
            rows.append({"kind": "build", "workers": workers, "seconds": build.by(workers)})
        print(f" {workers} workers: {rows[-1]['seconds']:.1f} s", flush=True)
    return rows


def claims(rows: list[Row]) -> list[Claim]:
    """What the rows show."""
    sites = [row for row in rows if row["kind"] == "site"]
    taken: dict[int, list[float]] = {}
    for row in rows:
        if row["kind"] == "build":
            taken.setdefault(row["workers"], []).append(row["seconds"])
    one, two = (sum(taken[workers]) / len(taken[workers]) for workers in (1, 2))
    files, stored = (sum(row[key] for row in sites) for key in ("file_bytes", "stored_bytes"))
    return [
        at_most("bank / stored bits of its options", files / stored, "x", SIZE),
        at_most(
            "memory / largest block's statistics", max(r["memory"] for r in sites), "x", MEMORY
        ),
        at_least("build by one worker", one, "s", LEAST_SECONDS),
        at_least("speed of two workers / one", one / two, "x", SPEED),
    ]


def main() -> None:
    """Build the banks, print the tables, write the results."""
    os.environ.update(dict.fromkeys(THREAD_VARIABLES, str(THREADS)))
    torch.set_num_threads(THREADS)
    with tempfile.TemporaryDirectory(prefix="ap-bank-") as name:
        rows = size_and_memory(shipped(Path(name) / "shipped"))
        _show(rows)
        rows += speed(wide(Path(name) / "wide"))
    write("bank", THREADS, rows, claims(rows))


def _show(rows: list[Row]) -> None:
    told = [
        [
            row["site"],
            f"{row['file_bytes'] / 1e6:.3f}",
            f"{row['file_bytes'] / row['stored_bytes']:.4f}",
            f"{row['allocated_bytes'] / 1e6:.2f}",
            f"{row['python_bytes'] / 1e6:.2f}",
            f"{row['memory']:.2f}",
        ]
        for row in rows
    ]
    columns = ("site", "MB", "/ stored", "torch MB", "Python MB", "/ statistics")
    table(columns, told, [f"{len(OPTIONS)} options: {' '.join(OPTIONS)}"])


if __name__ == "__main__":
    main()
