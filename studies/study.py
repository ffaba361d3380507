"""A study as a user holds it: submit, resume, look at its front, export. Imports nothing heavy."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

from apportion.errors import InvalidInput
from apportion.studies.changes import (
    LIMITS,
    TOKENS,
    WORKERS,
    changed,
    changes_search,
    differing,
    first_round,
    in_force,
    told,
)
from apportion.studies.cli import reports
from apportion.studies.cli.display import Display, QuietDisplay
from apportion.studies.cli.records import CheckReport, Report, SiteRow, Status, StudyRow
from apportion.studies.database.rows import Change
from apportion.studies.database.rows import StudyRow as StoredStudy
from apportion.studies.database.store import Store
from apportion.studies.holding import NOW
from apportion.studies.home import Home
from apportion.studies.progress import FINISHED, RUNNING, loss_name, status_of, study_row
from apportion.studies.running import Run, message_of
from apportion.studies.specification import StudySpec, difference, load

if TYPE_CHECKING:
    from apportion.studies.stages.export import Chosen
    from apportion.workers.spec import Setting


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
        self._store = store
        self._id = row.id
        self.spec = in_force(StudySpec(**row.specification), self.changes())

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
        ray: str | None = None,
    ) -> "Study":
        """Run a study to its end. A known name with the same specification starts nothing.

        Args:
            spec: a specification, or the path of a study file.
            home: the folder of the database, the bank and the cache.
            database: address of the database, if it is not in the home.
            workers: evaluations at a time; more than one run in processes of their own.
            display: told what happens.
            stop: set it to stop: what runs ends and is stored.
            ray: address of a Ray cluster whose nodes evaluate, "HOST:PORT"; None: this machine.

        Raises:
            InvalidInput: something is wrong with the specification, the model or the data, or the
                name stands for another specification; or no cluster is at that address.
        """
        display = display or QuietDisplay()
        here = workers if ray is None else 1
        study, setting = cls._create(spec, _home(home, database), here, display)
        if setting is not None:
            study._run(Run(workers, display, stop or Event(), ray=ray, setting=setting))
        return study

    @classmethod
    def submit_detached(
        cls,
        spec: StudySpec | str | Path,
        *,
        home: Home | str | Path | None = None,
        database: str | None = None,
        workers: int = 1,
        display: Display | None = None,
        ray: str | None = None,
    ) -> "Study | None":
        """Have a study run by a process of its own, which goes on when this one ends.

        Returns:
            The study; None: it was there already, and nothing was started.

        Raises:
            InvalidInput: like `submit`.
            ApportionError: the process did not start; what it said is in the message.
        """
        from apportion.studies.detached import launch

        display = display or QuietDisplay()
        here = workers if ray is None else 1
        study, setting = cls._create(spec, _home(home, database), here, display)
        if setting is None:
            return None
        launch(study.home, study._store, study.name, workers, ray)
        return study

    @classmethod
    def _create(
        cls, spec: StudySpec | str | Path, place: Home, workers: int, display: Display
    ) -> "tuple[Study, Setting | None]":
        """A new study with what was opened to check it; with None: it was there already."""
        spec = spec.absolute(Path.cwd()) if isinstance(spec, StudySpec) else load(spec)
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
            return study, None
        from apportion.studies.preparation import prepare

        setting = prepare(spec, place, workers, display)
        row = store.create_study(spec.study.name, spec.to_json(), spec.spec_hash)
        return cls(place, store, row), setting

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
        self,
        workers: int | None = None,
        display: Display | None = None,
        stop: Event | None = None,
        *,
        limits: Mapping[str, str] | None = None,
        tokens: int | None = None,
        take_over: bool = False,
        ray: str | None = None,
    ) -> None:
        """Continue where the study stands; nothing that is stored is done again.

        Other limits or tokens begin a new round of the search, also of a finished study; what was
        evaluated before is reused. Changes are recorded with the study.

        Args:
            workers: evaluations at a time; None: as many as before.
            display: told what happens.
            stop: set it to stop: what runs ends and is stored.
            limits: kind -> limit, in place of what the study file says, or beside it.
            tokens: the budget of the search, in place of what the study file says.
            take_over: from a process that still holds it; that one writes nothing any more.
            ray: address of a Ray cluster whose nodes evaluate; None: this machine, wherever the
                study ran before.

        Raises:
            InvalidInput: another process runs it, its model, data or code have changed, or what is
                changed cannot be.
        """
        display = display or QuietDisplay()
        status = self.status()
        asked = {LIMITS: limits or {}, TOKENS: tokens, WORKERS: workers}
        # a study that has not run yet, such as a detached one, has no workers to change
        before = message_of(self._row()).get("workers", workers or 1)
        change = differing(self.spec, int(before), asked)
        if status["state"] == FINISHED and not changes_search(change):
            display.line(f" study {self.name} is finished; nothing is left to do")
            return
        spec = changed(self.spec, change)
        if change:
            display.line(f" resuming with {told(change)}")
        elif status["state"] != RUNNING:
            stage = status["stage"] or "its beginning"
            display.line(f" resuming at {stage}, {reports.tokens(status)}")
        workers = workers or status["workers"]
        run = Run(workers, display, stop or Event(), change, take_over, ray)
        self._run(run, spec)

    def _run(self, run: Run, spec: StudySpec | None = None) -> None:
        from apportion.studies.running import run_study

        run_study(self.home, self._store, self._id, spec or self.spec, run)
        self.spec = in_force(StudySpec(**self._row().specification), self.changes())

    def changes(self) -> list[Change]:
        """What was changed of the specification since the study was submitted, in order."""
        return self._store.changes(self._id)

    def stop(self, now: bool = False) -> None:
        """Ask the process that runs the study to stop: what runs ends and is stored.

        Args:
            now: what runs is given up.

        Raises:
            InvalidInput: no process runs it.
        """
        if not self._row().is_owned:
            raise InvalidInput(f'study "{self.name}" is not being run')
        self._store.ask_to_stop(self._id, NOW if now else "gently")

    def _refuse_another(self, spec: StudySpec) -> None:
        found = difference(StudySpec(**self._row().specification), spec)
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
        return status_of(self._store, self._row(), self.spec)

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
        last = first_round(self.changes())
        report = self._store.stage_output(self._id, "report", last)
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

        export(self._chosen(Path(folder), trial), self._report(), Path(folder))
        return Path(folder)

    def export_evopress(self, folder: str | Path, trial: int | None = None) -> Path:
        """Write the winner, or the front point of trial `trial`, as EvoPress keeps it.

        A database of dense weights, a level configuration and a drop configuration.

        Raises:
            InvalidInput: like `export`; or an option is no number of bits.
        """
        from apportion.studies.evopress.export import export

        export(self._chosen(Path(folder), trial), Path(folder))
        return Path(folder)

    def _chosen(self, folder: Path, trial: int | None) -> "Chosen":
        from apportion.studies.stages.export import choose

        report = self._report()
        return choose(self.spec, self.home, self._store, self._id, report, folder, trial)

    def export_optuna(self, url: str) -> int:
        """Add the finished trials that are not there yet to an Optuna database.

        Args:
            url: of an Optuna RDB storage, "sqlite:///optuna.db".

        Returns:
            How many were added.

        Raises:
            InvalidInput: the address cannot be used, or belongs to another study.
        """
        from apportion.studies.optuna_view.export import export_study

        return export_study(self._store, self._row(), url)


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


def _home(home: Home | str | Path | None, database: str | None) -> Home:
    return home if isinstance(home, Home) else Home.find(home, database)
