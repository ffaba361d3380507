"""One run of a study, from wherever it stands: who holds it, what is said, how it ended."""

import errno
import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from threading import Event
from typing import TYPE_CHECKING, Any

from apportion.errors import ApportionError, InvalidInput
from apportion.studies.changes import changes_search, first_round
from apportion.studies.cli.display import Display
from apportion.studies.database.engine import DatabaseAway
from apportion.studies.database.rows import LeaseLost, StudyRow
from apportion.studies.database.store import Store
from apportion.studies.holding import leased, waiting
from apportion.studies.home import Home
from apportion.studies.specification import StudySpec
from apportion.studies.upkeep import note_database

if TYPE_CHECKING:
    from apportion.studies.context import Context
    from apportion.workers.spec import Setting

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class Run:
    """How a study is to be run.

    Attributes:
        workers: evaluations at a time.
        stop: set to stop it: what runs ends and is stored.
        change: what of the specification is changed with this run.
        take_over: from a process that still holds the study.
        ray: address of the Ray cluster to run on; None: this machine alone.
        setting: the opened model and data, where they are at hand.
    """

    workers: int
    display: Display
    stop: Event
    change: dict[str, Any] = field(default_factory=dict)
    take_over: bool = False
    ray: str | None = None
    setting: "Setting | None" = None


def run_study(home: Home, store: Store, study_id: int, spec: StudySpec, run: Run) -> None:
    """Run a study to its end, or until it is stopped.

    Args:
        spec: its specification with `run.change`.

    Raises:
        InvalidInput: another process runs it, or something of the user's is wrong or has changed.
        ApportionError: something else went wrong; what is finished is stored.
    """
    from apportion.studies.context import Context

    home.create()
    note_database(home)
    with leased(store, study_id, run.stop, run.display, run.take_over) as lease:
        # not before: a study that cannot be had is not waited for
        store.database.goes_on = waiting(run.stop, run.display)
        context = Context(spec, home, store, study_id, lease, run.display, run.stop, run.workers)
        context.progress |= message_of(_row(context)) | {"workers": run.workers}
        context.first_round = first_round(store.changes(study_id))
        if run.change:
            context.change = run.change
            if changes_search(run.change):
                rounds = [trial.round for trial in store.trials(study_id)]
                context.first_round = max(rounds, default=-1) + 1
        if run.setting is not None:
            context.take(run.setting)
        _show_header(context)
        with _joined(context, run.ray):
            _drive(context)


@contextmanager
def _joined(context: "Context", address: str | None) -> Iterator[None]:
    """The context's cluster while the block runs."""
    if address is None:
        yield
        return
    from apportion.workers.ray_cluster import RayCluster

    try:
        cluster = RayCluster(address, context.spec.objective.threads, context.display.warning)
    except InvalidInput:
        # Nothing is wrong with the study; submitted now, it can be submitted again.
        if not context.store.forget(context.lease):
            context.say("stopped", _row(context).stage)
        raise
    context.cluster = cluster
    try:
        yield
    finally:
        cluster.leave()


def message_of(row: StudyRow) -> dict[str, Any]:
    """What the driver has told of its progress."""
    with suppress(ValueError):
        value = json.loads(row.message)
        return value if isinstance(value, dict) else {}
    return {}


def _row(context: "Context") -> StudyRow:
    row = context.store.find_study(context.spec.study.name)
    if row is None:
        raise InvalidInput(f'study "{context.spec.study.name}" is gone from the database')
    return row


def _drive(context: "Context") -> None:
    """Run the stages, and store how they ended."""
    from apportion.studies.driver import drive
    from apportion.studies.evaluations import Stopped
    from apportion.studies.stages.discover import Changed

    def ended(state: str) -> None:
        context.say(state, _row(context).stage)

    try:
        drive(context)
    except (Changed, BrokenPipeError, DatabaseAway):
        # The study itself has nothing wrong: who read the output left, or something is not where
        # it was.
        with suppress(DatabaseAway):
            ended("stopped")
        raise
    except Stopped:
        ended("stopped")
    except LeaseLost:
        raise
    except InvalidInput:
        # Nothing was evaluated yet: a corrected study file may take the same name.
        if context.change is None and not context.store.forget(context.lease):
            ended("failed")
        raise
    except OSError as error:
        if error.errno not in NO_SPACE:
            ended("failed")
            raise
        raise ApportionError(
            f"{context.home.path}: the disk is full; free some space, then resume"
        ) from error
    except Exception:
        ended("failed")
        raise


def _show_header(context: "Context") -> None:
    from apportion import __version__

    spec = context.spec
    parameters = sum(p.numel() for p in context.model.parameters()) / 1e6
    blocks = len(context.setting.blocks)
    devices = ", ".join(
        f"{name}: {device.kind}" + (f", {device.threads} threads" if device.threads else "")
        for name, device in spec.devices.items()
    )
    context.display.header(
        f"apportion {__version__} · study {spec.study.name} · model {parameters:.1f} M "
        f"parameters, {blocks} blocks · {devices} · home {context.home.shown}"
    )
