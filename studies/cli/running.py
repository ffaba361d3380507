"""Commands that run a study: submit, resume."""

from collections.abc import Callable
from threading import Event
from typing import TYPE_CHECKING, Annotated

import typer

from apportion.errors import InvalidInput
from apportion.studies.cli.beginning import StudyFile
from apportion.studies.cli.display import Display
from apportion.studies.cli.failures import INTERRUPTED
from apportion.studies.cli.interrupt import interruptible
from apportion.studies.cli.reports import show_front
from apportion.studies.cli.session import Session, naming
from apportion.studies.specification import load

if TYPE_CHECKING:
    from apportion.studies.study import Study

Workers = Annotated[int, typer.Option(metavar="N", help="Evaluations at a time.")]
Name = Annotated[str, typer.Argument(metavar="NAME", help="A study's name.")]


def submit(context: typer.Context, study_file: StudyFile, workers: Workers = 1) -> None:
    """Run a study to its end, from its file."""
    if workers < 1:
        raise InvalidInput(f"--workers {workers}: must be at least 1")
    spec = load(study_file)
    session = context.ensure_object(Session)
    session.study = spec.study.name
    with session.working(spec.objective.threads) as display, naming(study_file):
        from apportion.studies.study import Study

        home = session.home

        def work(stop: Event) -> "Study":
            return Study.submit(
                spec, home=home, database=home.database, workers=workers, display=display, stop=stop
            )

        _run(session, display, work)


def resume(context: typer.Context, name: Name) -> None:
    """Continue a study where it ended; needs no file."""
    from apportion.studies.study import Study

    session = context.ensure_object(Session)
    study = Study.open(name, session.home, session.home.database)
    session.study = name
    with session.working(study.spec.objective.threads) as display:

        def work(stop: Event) -> Study:
            study.resume(display=display, stop=stop)
            return study

        _run(session, display, work)


def _run(session: Session, display: Display, work: Callable[[Event], "Study"]) -> None:
    """Run `work` until it ends or is interrupted, and show what came out."""
    resume_line = f" to go on: {session.home.command(f'resume {session.study}')}"
    with interruptible(lambda text: display.warning(text)) as stop:
        try:
            study = work(stop)
        except KeyboardInterrupt:
            display.line(resume_line)
            raise typer.Exit(INTERRUPTED) from None
    if stop.is_set() and study.status()["state"] != "finished":
        display.line(resume_line)
        raise typer.Exit(INTERRUPTED)
    if study.status()["state"] == "finished":
        show_front(display, study.show())
