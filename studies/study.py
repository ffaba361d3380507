"""A study as a user holds it: submit, resume, look at its front, export. Imports nothing heavy."""

import datetime
import errno
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

from apportion.errors import ApportionError, InvalidInput
from apportion.studies.cli import reports
from apportion.studies.cli.display import Display, QuietDisplay
from apportion.studies.cli.records import CheckReport, Report, SiteRow, Status, StudyRow
from apportion.studies.database.rows import StudyRow as StoredStudy
from apportion.studies.database.store import Store
from apportion.studies.home import Home
from apportion.studies.specification import StudySpec, difference, load

if TYPE_CHECKING:
    from apportion.workers.spec import Setting

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
FINISHED, RUNNING = "finished", "running"


@dataclass(frozen=True)
class Point:
    """A configuration of the front, judged on held-out data.

    Attributes:
        number: of its trial; `export(trial=number)` takes it.
        loss_heldout: in the unit of the objective, with its standard error.
        latency_ms: device -> milliseconds of the request, measured where the device is here.
        configuration: site -> option.
    """

    number: int
    loss_heldout: float | None
    loss_error: float | None
    latency_ms: Mapping[str, float]
    weight_bytes: int
    bits: float
    configuration: Mapping[str, str]


class Study:
    """One study of a database."""

    def __init__(self, home: Home, store: Store, row: StoredStudy) -> None:
        self.home = home
        self.name = row.name
        self.spec = StudySpec(**row.specification)
        self._store = store
        self._id = row.id

    @classmethod
    def submit(
        cls,
        spec: StudySpec | str | Path,
        *,
        home: Home | str | Path | None = None,
        database: str | None = None,
        workers: int = 1,
        display: Display | None = None,
        stop: Event | None = None,
    ) -> "Study":
        """Run a study to its end. A known name with the same specification starts nothing.

        Args:
            spec: a specification, or the path of a study file.
            home: the folder of the database, the bank and the cache.
            database: address of the database, if it is not in the home.
            workers: evaluations at a time; more than one run in processes of their own.
            display: told what happens.
            stop: set it to stop: what runs ends and is stored.

        Raises:
            InvalidInput: something is wrong with the specification, the model or the data, or the
                name stands for another specification.
        """
        spec = spec.absolute(Path.cwd()) if isinstance(spec, StudySpec) else load(spec)
        display = display or QuietDisplay()
        place = _home(home, database)
        place.create()
        store = Store.open(place.database)
        row = store.find_study(spec.study.name)
        if row is not None:
            study = cls(place, store, row)
            study._refuse_another(spec)
            state = study.status()["state"]
            display.line(f" study {spec.study.name} is {state} already; nothing was started")
            if state not in (FINISHED, RUNNING):
                display.line(f" to go on: {place.command(f'resume {spec.study.name}')}")
            return study
        from apportion.studies.preparation import prepare

        setting = prepare(spec, place, workers, display)
        row = store.create_study(spec.study.name, spec.to_json(), spec.spec_hash)
        study = cls(place, store, row)
        study._run(workers, display, stop or Event(), setting)
        return study

    @classmethod
    def open(
        cls, name: str, home: Home | str | Path | None = None, database: str | None = None
    ) -> "Study":
        """A study by name.

        Raises:
            InvalidInput: there is none of that name in this home.
        """
        place = _home(home, database)
        if place.database_url is None and not (place.path / "studies.db").is_file():
            raise InvalidInput(f'no study "{name}" in {place.path}: no study was submitted there')
        store = Store.open(place.database)
        row = store.find_study(name)
        if row is None:
            names = ", ".join(study.name for study in store.studies()) or "none"
            raise InvalidInput(f'no study "{name}" in {place.path}; studies there: {names}')
        return cls(place, store, row)

    def resume(
        self, workers: int | None = None, display: Display | None = None, stop: Event | None = None
    ) -> None:
        """Continue where the study stands; nothing that is stored is done again.

        Args:
            workers: evaluations at a time; None: as many as before.
            display: told what happens.
            stop: set it to stop: what runs ends and is stored.

        Raises:
            InvalidInput: another process runs it, or its model, data or code have changed.
        """
        display = display or QuietDisplay()
        status = self.status()
        if status["state"] == FINISHED:
            display.line(f" study {self.name} is finished; nothing is left to do")
            return
        if status["state"] != RUNNING:
            stage = status["stage"] or "its beginning"
            display.line(f" resuming at {stage}, {reports.tokens(status)}")
        self._run(workers or status["workers"], display, stop or Event(), None)

    def _run(self, workers: int, display: Display, stop: Event, setting: "Setting | None") -> None:
        from apportion.studies.context import Context
        from apportion.studies.driver import drive, leased
        from apportion.studies.evaluations import Stopped
        from apportion.studies.stages.discover import Changed

        self.home.create()
        with leased(self._store, self._id) as lease:
            context = Context(
                self.spec, self.home, self._store, self._id, lease, display, stop, workers
            )
            context.progress |= _message(self._row()) | {"workers": workers}
            if setting is not None:
                context.take(setting)
            self._header(display, context)
            try:
                drive(context)
            except Stopped:
                context.say("stopped", self._row().stage)
            except Changed:
                context.say("stopped", self._row().stage)
                raise
            except InvalidInput:
                # Nothing was evaluated yet: a corrected study file may take the same name.
                if not self._store.forget(lease):
                    context.say("failed", self._row().stage)
                raise
            except BrokenPipeError:
                # Who read the output left; the study itself has nothing wrong.
                context.say("stopped", self._row().stage)
                raise
            except OSError as error:
                if error.errno not in NO_SPACE:
                    context.say("failed", self._row().stage)
                    raise
                raise ApportionError(
                    f"{self.home.path}: the disk is full; free some space, then resume"
                ) from error
            except Exception:
                context.say("failed", self._row().stage)
                raise

    def _header(self, display: Display, context: Any) -> None:
        from apportion import __version__

        parameters = sum(p.numel() for p in context.model.parameters()) / 1e6
        blocks = len(context.setting.blocks)
        devices = ", ".join(
            f"{name}: {device.kind}" + (f", {device.threads} threads" if device.threads else "")
            for name, device in self.spec.devices.items()
        )
        display.header(
            f"apportion {__version__} · study {self.name} · model {parameters:.1f} M parameters, "
            f"{blocks} blocks · {devices} · home {self.home.shown}"
        )

    def _refuse_another(self, spec: StudySpec) -> None:
        found = difference(self.spec, spec)
        if found:
            changes = "; ".join(found)
            raise InvalidInput(
                f'study "{self.name}" exists with another specification ({changes}); '
                "choose another name; what is still valid is reused"
            )

    def _row(self) -> StoredStudy:
        row = self._store.find_study(self.name)
        if row is None:
            raise InvalidInput(f'study "{self.name}" is gone from {self.home.path}')
        return row

    def status(self) -> Status:
        """How far the study is."""
        row = self._row()
        message = _message(row)
        return Status(
            **study_row(self._store, row),
            loss=loss_name(self.spec),
            workers=int(message.get("workers", 1)),
            recoveries=int(message.get("recoveries", 0)),
            cached=int(message.get("cached", 0)),
            seconds_left=None,
        )

    def show(self) -> Report:
        """The front, the uniform configurations, the winner and its rival.

        Raises:
            InvalidInput: the study has not come to its end.
        """
        report = self._report()
        return Report(
            study=self.name,
            loss=loss_name(self.spec),
            limits={kind: str(text) for kind, text in self.spec.limits.items()},
            front=report["front"],
            uniform=report["uniform"],
            winner=report["winner"],
            rival=report["rival"],
            notes=report["notes"],
            seconds=self._store.stage_seconds(self._id),
        )

    def _report(self) -> dict[str, Any]:
        report = self._store.stage_output(self._id, "report")
        if report is None:
            status = self.status()
            raise InvalidInput(
                f'study "{self.name}" has no front yet: it is {status["state"]} at '
                f"{status['stage'] or 'its beginning'}; "
                f"to go on: {self.home.command(f'resume {self.name}')}"
            )
        return report

    def front(self) -> list[Point]:
        """The points of the front, largest first. Raises InvalidInput like `show`."""
        return [
            Point(
                number=point["number"],
                loss_heldout=point["loss_heldout"],
                loss_error=point["loss_error"],
                latency_ms={
                    device: found["measured"] or found["predicted"]
                    for device, found in point["latency_ms"].items()
                },
                weight_bytes=point["weight_bytes"],
                bits=point["bits"],
                configuration=point["configuration"],
            )
            for point in self._report()["front"]
        ]

    def plot(self, path: str | Path) -> Path:
        """Draw the front. Raises InvalidInput where matplotlib is missing."""
        from apportion.studies.plot import draw

        return draw(self.show(), Path(path))

    def export(self, folder: str | Path, trial: int | None = None) -> Path:
        """Write the winner, or the front point of trial `trial`, as a native artifact.

        Raises:
            InvalidInput: the folder exists, or the trial is no point of the front.
        """
        from apportion.studies.stages.export import export

        return export(self.spec, self.home, self._store, self._id, Path(folder), trial)


def list_studies(
    home: Home | str | Path | None = None, database: str | None = None
) -> list[StudyRow]:
    """The studies of a home, oldest first."""
    place = _home(home, database)
    if place.database_url is None and not (place.path / "studies.db").is_file():
        return []
    store = Store.open(place.database)
    try:
        return [study_row(store, row) for row in store.studies()]
    finally:
        store.close()


def check(spec: StudySpec, home: Home, display: Display | None = None) -> CheckReport:
    """What a study would do and need. Raises InvalidInput with what is wrong."""
    from apportion.studies.preparation import check as check_all

    return check_all(spec, home, display or QuietDisplay())


def sites(source: str | StudySpec) -> list[SiteRow]:
    """The sites of a model, or of a study with their options."""
    from apportion.studies.listing import site_rows

    return site_rows(source)


def study_row(store: Store, row: StoredStudy) -> StudyRow:
    """A stored study as `list` prints it."""
    spec = StudySpec(**row.specification)
    message = _message(row)
    state = {"done": FINISHED, "failed": "failed"}.get(row.state, "interrupted")
    if row.state == RUNNING and row.is_owned:
        state = RUNNING
    best = message.get("best")
    created = datetime.datetime.fromtimestamp(row.created_at, datetime.UTC)
    return StudyRow(
        name=row.name,
        state=state,
        stage=row.stage or None,
        tokens_spent=int(message.get("tokens", 0)),
        tokens=spec.search.tokens,
        unit=spec.data.unit,
        best_loss=best if isinstance(best, float) else None,
        created=created.isoformat(timespec="seconds"),
    )


def loss_name(spec: StudySpec) -> str:
    """The objective as tables name it."""
    names = {"kl": "KL", "perplexity": "perplexity", "accuracy": "error rate"}
    return names.get(spec.objective.loss, "loss")


def _message(row: StoredStudy) -> dict[str, Any]:
    with suppress(ValueError):
        value = json.loads(row.message)
        return value if isinstance(value, dict) else {}
    return {}


def _home(home: Home | str | Path | None, database: str | None) -> Home:
    return home if isinstance(home, Home) else Home.find(home, database)
