"""A study with trials of every kind, in a real store."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from apportion.hashing import content_hash
from apportion.studies.database import Evaluation, Layout, Lease, NewTrial, Store, StudyRow
from apportion.studies.specification import StudySpec

OPTIONS = ("dense", "w4g64", "s50%+w4g64", "r50%")
SITES = {
    "block.0": ("keep", "drop"),
    "block.0.a": OPTIONS,
    "block.0.b": OPTIONS,
    "block.1": ("keep", "drop"),
    "block.1.a": OPTIONS,
    "block.1.b": OPTIONS,
}
COSTS = ("weight_bytes", "bits", "latency.here")
LAYOUT = Layout(SITES, COSTS)
WINDOWS = 8


def specification(name: str = "demo", **limits: str) -> StudySpec:
    return StudySpec(
        study={"name": name},
        model={"source": "hf:org/model"},
        data={"source": "text:/corpus"},
        space=[
            {"sites": "*", "options": list(OPTIONS)},
            {"sites": "*", "options": ["keep", "drop"]},
        ],
        limits=limits or {"weight_bytes": "1 MB", "latency.here": "0.5x dense"},
        search={"windows": WINDOWS, "stages": [2, WINDOWS]},
    )


@dataclass
class Written:
    """A study being written by this process."""

    store: Store
    row: StudyRow
    lease: Lease

    def propose(
        self,
        configuration: Mapping[str, str] | None = None,
        windows: int = WINDOWS,
        origin: str = "hybrid:b1:mutant",
        costs: Sequence[float] = (2e6, 4.5, 3.0),
        round: int = 0,
    ) -> NewTrial:
        """One more trial of its own evaluation."""
        number = self.store.trial_count(self.row.id)
        neutral = {site: options[0] for site, options in SITES.items()}
        trial = NewTrial(
            configuration=neutral | dict(configuration or {}),
            first_window=0,
            windows=windows,
            part="search",
            origin=origin,
            costs=dict(zip(COSTS, costs, strict=True)),
            evaluation_key=content_hash([self.row.name, number]),
        )
        self.store.record_proposals(self.lease, round, number, LAYOUT, [trial], {})
        return trial

    def evaluate(self, trial: NewTrial, loss: float = 0.25) -> None:
        """Stores a result of that mean loss."""
        weights = np.full(trial.windows, 4.0)
        done = Evaluation(weights * loss, weights, None, seconds=1.5)
        self.store.record_evaluation(self.lease, trial.evaluation_key, done)

    def fail(self, trial: NewTrial, error_class: str = "raised") -> None:
        """Stores a failure."""
        failed = Evaluation(None, None, "out of memory", 1.0, error_class)
        self.store.record_evaluation(self.lease, trial.evaluation_key, failed)

    def confirm(self, limits: Mapping[str, float], round: int = 0) -> None:
        """Stores what a confirmed round says of its limits."""
        found = {kind: {"value": value, "ratio": {}} for kind, value in limits.items()}
        self.store.record_stage(self.lease, "confirm", round, {"limits": found}, 1.0)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store.open(tmp_path / "studies.db")
    yield store
    store.close()


@pytest.fixture
def study(store: Store) -> Written:
    return written(store, specification())


def written(store: Store, spec: StudySpec) -> Written:
    row = store.create_study(spec.study.name, spec.to_json(), spec.spec_hash)
    lease = store.acquire(row.id, 60)
    store.set_state(lease, "running", "search", "")
    return Written(store, row, lease)
