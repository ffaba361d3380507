"""Cells of a benchmark: studies of the shipped model in one home, all on one recorded device.

Interrupted ones go on, finished ones are not run again, and no configuration is evaluated twice.
Two processes of one thread each: cells do not depend on each other, while a second thread inside a
forward pass of this small model gains less than a whole core.
"""

import math
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import Any

from _report import ROOT

from apportion.cost_models.fingerprint import fingerprint
from apportion.cost_models.profile import measure_profile
from apportion.cost_models.recorded import read_recorded, write_recorded
from apportion.cost_models.requests import RequestItem
from apportion.cost_models.session import Timing
from apportion.studies.cli.display import QuietDisplay
from apportion.studies.cli.session import Session
from apportion.studies.context import Context
from apportion.studies.database.rows import Evaluation, Lease
from apportion.studies.database.store import Store
from apportion.studies.home import Home
from apportion.studies.progress import FINISHED
from apportion.studies.specification import StudySpec, load
from apportion.studies.stages.profile import request_of, uniform_configs
from apportion.studies.study import Study
from apportion.workers.processes import THREAD_VARIABLES

PROCESSES, THREADS = 2, 1
STUDY_FILE = ROOT / "examples" / "demo" / "study.toml"
Row = dict[str, Any]


def recorded_tables(recording: Path) -> Row:
    """The demo's study on the recorded device, with the threads of a cell."""
    tables = load(STUDY_FILE).to_json()
    request = tables["devices"]["here"]["request"]
    device = {"kind": "recorded", "file": str(recording), "request": request}
    return tables | {
        "objective": tables["objective"] | {"threads": THREADS},
        "devices": {"here": device},
    }


def reading(spec: StudySpec, place: Home, store: Store, study_id: int = 0) -> Context:
    """A study's context, only to be read."""
    lease = Lease(study_id, 0, 0.0)
    return Context(spec, place, store, study_id, lease, QuietDisplay(), Event())


def record_device(specs: Sequence[StudySpec], place: Home, recording: Path, timing: Timing) -> None:
    """Time everything that the profiles of these studies look up; goes on after an interruption.

    Args:
        timing: how long and how exactly.
    """
    if recording.is_file():
        return
    part = recording.with_suffix(".part")
    taken = read_recorded(part).measurements if part.is_file() else {}
    with Session(place, study="recording").working(THREADS):
        for spec in specs:
            context = reading(spec, place, Store.open(place.database))
            space = context.setting.space
            measure_profile(
                context.model,
                space,
                [RequestItem.from_json(item) for item in request_of(spec.devices["here"])],
                context.setting.sample,
                threads=THREADS,
                known=taken,
                record=taken.update,
                seed=spec.study.seed,
                uniforms=list(uniform_configs(context.model, space).values()),
                timing=timing,
            )
            write_recorded(part, fingerprint(THREADS), taken)
    part.replace(recording)


@contextmanager
def processes() -> Iterator[ProcessPoolExecutor]:
    """What cells run in."""
    os.environ.update(dict.fromkeys(THREAD_VARIABLES, str(THREADS)))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(PROCESSES, mp_context=context) as pool:
        yield pool


def run_cells(pool: ProcessPoolExecutor, specs: Sequence[StudySpec], place: Home) -> None:
    """Bring all studies to their end, telling of each."""
    running = {pool.submit(run, spec, place): spec.study.name for spec in specs}
    for done, future in enumerate(as_completed(running), 1):
        future.result()
        print(f" {done} of {len(specs)} cells: {running[future]}", flush=True)


def run(spec: StudySpec, place: Home) -> None:
    """Bring a study to its end."""
    with Session(place, study=spec.study.name).working(THREADS):
        study = Study.submit(spec, home=place)
        if study.status()["state"] != FINISHED:
            study.resume()


def stage_outputs(store: Store, name: str, *stages: str) -> tuple[int, list[Row]]:
    """A finished study's id, and what its stages came to."""
    study = store.find_study(name)
    outputs = [store.stage_output(study.id, stage) if study else None for stage in stages]
    known = [output for output in outputs if output is not None]
    if study is None or len(known) < len(stages):
        raise SystemExit(f"study {name} is not finished")
    return study.id, known


def losses_mean(evaluation: Evaluation) -> float:
    """Mean loss of an evaluation; nan where it failed."""
    if evaluation.losses is None or evaluation.weights is None:
        return math.nan
    return float(evaluation.losses.sum() / evaluation.weights.sum())
