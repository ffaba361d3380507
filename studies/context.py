"""What the stages of one study share while its driver runs."""

import json
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from threading import Event
from typing import Any

import torch
from torch import nn

from apportion.spaces.bank import Bank
from apportion.studies.cli.display import Display
from apportion.studies.database.rows import Lease
from apportion.studies.database.store import Store
from apportion.studies.evaluations import Naming, Stopped
from apportion.studies.home import Home
from apportion.studies.specification import StudySpec
from apportion.workers.pool import Evaluate, Pool
from apportion.workers.ray_cluster import RayCluster
from apportion.workers.samples import PARTS, Part, Samples
from apportion.workers.sources import OpenedModel
from apportion.workers.spec import Setting, WorkerSpec, open_setting

RANK_MULTIPLE = 8
Output = dict[str, Any]


def worker_spec(spec: StudySpec, home: Home, index: Path | None = None) -> WorkerSpec:
    """What a worker of this study is made of; `index` lists the bank's entries."""
    return WorkerSpec(
        source=spec.model.source,
        dtype=spec.model.dtype,
        trust_remote_code=spec.model.trust_remote_code,
        data=spec.data.model_dump(mode="json", exclude_none=True),
        seed=spec.study.seed,
        objective=spec.objective.loss,
        threads=spec.objective.threads,
        batch=spec.objective.batch,
        space=[[list(e.sites), list(e.options), e.unfit == "skip"] for e in spec.space],
        rank_multiple=RANK_MULTIPLE,
        bank=str(home.bank),
        index=str(index or ""),
        base=str(home.path),
        budgets={},
    )


@dataclass
class Context:
    """One study at work.

    Attributes:
        spec: its specification, paths absolute.
        lease: the right to write to it.
        stop: set when the user asked to stop.
        workers: processes that evaluate; 1: this one, unless there is a cluster.
        cluster: where they are and where devices may be; None: all is on this machine.
        first_round: of the specification, which a resume may have changed.
        change: what of it this run changes; None: nothing, or it is stored.
        progress: what `status` tells of a search: tokens, best, recoveries.
    """

    spec: StudySpec
    home: Home
    store: Store
    study_id: int
    lease: Lease
    display: Display
    stop: Event
    workers: int = 1
    cluster: RayCluster | None = None
    first_round: int = 0
    change: dict[str, Any] | None = None
    progress: dict[str, Any] = field(default_factory=dict)
    _samples: dict[Part, Samples] = field(default_factory=dict)
    _billed: dict[str, tuple[int, float]] = field(default_factory=dict)

    @cached_property
    def setting(self) -> Setting:
        """The dense model with its space and its data."""
        torch.set_num_threads(self.spec.objective.threads)
        return open_setting(worker_spec(self.spec, self.home))

    def take(self, setting: Setting) -> None:
        """Use what was opened to check the study, before it was created."""
        self.__dict__["setting"] = setting

    @property
    def opened(self) -> OpenedModel:
        """The dense model and its tokenizer."""
        return self.setting.opened

    @property
    def model(self) -> nn.Module:
        """The dense model's module."""
        return self.opened.model

    def samples(self, part: Part) -> Samples:
        """The windows of one part of the data."""
        if part not in self._samples:
            self._samples[part] = self.setting.open_part(part)
        return self._samples[part]

    @property
    def bank(self) -> Bank:
        """The bank of realized options."""
        return Bank(self.home.bank)

    @property
    def window_tokens(self) -> int:
        """What one window costs of the budget."""
        return (self.spec.data.context or 1) if self.spec.data.is_text else 1

    @property
    def numerics(self) -> str:
        """What the bits of a loss depend on beside the numbers that go in."""
        objective = self.spec.objective
        machine = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
        return f"{objective.threads} {objective.batch} torch {torch.__version__} {machine}"

    def naming(self, bank: dict[str, dict[str, str]]) -> Naming:
        """What names this study's evaluations; `bank` is site -> option -> entry."""
        return Naming(
            model=f"{self.opened.revision} {self.spec.model.dtype}",
            data={part: self.samples(part).hash for part in PARTS},
            objective=f"{self.spec.objective.loss} {self.setting.objective.hash}",
            numerics=self.numerics,
            bank=bank,
        )

    def say(self, state: str, stage: str, pool: Pool | None = None) -> None:
        """Tell the database what the study is at, and what its workers have done."""
        self.store.set_state(self.lease, state, stage, json.dumps(self.progress))
        if pool is not None:
            self.record_bill(pool)

    def record_bill(self, pool: Pool) -> None:
        """Store what the workers of this lease have done."""
        entries = {o: entry for o, entry in pool.bill.entries().items() if entry[0]}
        if entries != self._billed:
            self.store.record_bill(self.lease, entries)
            self._billed = entries

    def tell_overdue(self, work: Evaluate, seconds: float, limit: float) -> None:
        """An evaluation of this process hangs, which nothing can end but its user."""
        self.display.warning(
            f"an evaluation of {work.windows} windows has been running for {seconds:.0f} s, longer "
            f"than its like ({limit:.0f} s at most); if it hangs, Ctrl-C and resume with "
            "--workers 2: a worker of its own can be ended"
        )

    def record_change(self) -> None:
        """Store what this run was asked to change, once it is known to be possible."""
        if self.change is not None:
            self.store.record_change(self.lease, self.first_round, self.change)
            self.change = None

    def report(self) -> Output | None:
        """What the study has come to; None: it is not at its end."""
        return self.store.stage_output(self.study_id, "report", self.first_round)

    def stage(self, name: str, compute: Callable[[], Output], round: int = 0) -> Output:
        """A stage's stored output, or that of running it now.

        Raises:
            Stopped: the user asked to stop before it began.
        """
        stored = self.store.stage_output(self.study_id, name, round)
        if stored is not None:
            return stored
        if self.stop.is_set():
            raise Stopped
        self.say("running", name)
        began = time.perf_counter()
        output = compute()
        self.store.record_stage(self.lease, name, round, output, time.perf_counter() - began)
        return output
