"""Commands that run a study or end its run: submit, resume, stop."""

import shlex
import time
from collections.abc import Callable
from threading import Event
from typing import TYPE_CHECKING, Annotated

import typer

from apportion.errors import ApportionError, InvalidInput
from apportion.studies.changes import parse_limits
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
Ray = Annotated[
    str | None,
    typer.Option("--ray", metavar="ADDRESS", help="HOST:PORT of a Ray cluster that evaluates."),
]
Name = Annotated[str, typer.Argument(metavar="NAME", help="A study's name.")]
STOP_SECONDS = 15.0
POLL_SECONDS = 0.2
NEXT = (
    ("watch", "status {} --follow"),
    ("stop", "stop {}"),
    ("resume", "resume {}"),
    ("front", "show {}"),
    ("export", "export {} --to winner/"),
)


def submit(
    context: typer.Context,
    study_file: StudyFile,
    workers: Workers = 1,
    detach: Annotated[
        bool, typer.Option("--detach", help="Return at once; the study goes on by itself.")
    ] = False,
    ray: Ray = None,
) -> None:
    """Run a study to its end, from its file."""
    _check_workers(workers)
    spec = load(study_file)
    session = context.ensure_object(Session)
    session.study = spec.study.name
    with session.working(spec.objective.threads) as display, naming(study_file):
        from apportion.studies.study import Study

        home = session.home
        if detach:
            study = Study.submit_detached(
                spec, home=home, workers=workers, display=display, ray=ray
            )
            if study is not None:
                _show_next(session, display, spec.study.name, ray)
            return

        def work(stop: Event) -> "Study":
            return Study.submit(
                spec,
                home=home,
                database=home.database,
                workers=workers,
                display=display,
                stop=stop,
                ray=ray,
            )

        _run(session, display, work, ray)


def resume(
    context: typer.Context,
    name: Name,
    limit: Annotated[
        list[str] | None,
        typer.Option(metavar="KIND=VALUE", help="Another limit, as latency.here=0.4x."),
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(metavar="N", help="Another budget of the search.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(metavar="N", help="Evaluations at a time. [as before]")
    ] = None,
    take_over: Annotated[
        bool, typer.Option("--take-over", help="From a process that is stuck and still holds it.")
    ] = False,
    ray: Ray = None,
) -> None:
    """Continue a study where it ended; needs no file. What is changed is recorded."""
    from apportion.studies.study import Study

    if workers is not None:
        _check_workers(workers)
    limits = parse_limits(limit or [])
    session = context.ensure_object(Session)
    study = Study.open(name, session.home, session.home.database)
    session.study = name
    with session.working(study.spec.objective.threads) as display:

        def work(stop: Event) -> Study:
            study.resume(
                workers,
                display,
                stop,
                limits=limits,
                tokens=tokens,
                take_over=take_over,
                ray=ray,
            )
            return study

        _run(session, display, work, ray)


def stop(
    context: typer.Context,
    name: Name,
    now: Annotated[bool, typer.Option("--now", help="What runs is given up.")] = False,
) -> None:
    """Stop a study: what runs comes to its end and is stored."""
    from apportion.studies.study import Study

    session = context.ensure_object(Session)
    study = Study.open(name, session.home, session.home.database)
    display = session.display()
    study.stop(now)
    display.line(f" stopping {name}" + ("" if now else ": what runs comes to its end"))
    deadline = time.monotonic() + STOP_SECONDS
    while (state := study.status()["state"]) == "running":
        if now and time.monotonic() > deadline:
            raise ApportionError(
                f"the process that runs {name} does not answer; "
                f"to go on without it: {session.home.command(f'resume {name} --take-over')}"
            )
        time.sleep(POLL_SECONDS)
    display.line(f" {name} is {state}")
    if state != "finished":
        display.line(f" to go on: {session.home.command(f'resume {name}')}")


def _check_workers(workers: int) -> None:
    if workers < 1:
        raise InvalidInput(f"--workers {workers}: must be at least 1")


def _show_next(session: Session, display: Display, name: str, ray: str | None) -> None:
    display.line(f" submitted {name}")
    for word, command in NEXT:
        line = session.home.command(command.format(name))
        display.line(f"   {word:8} {line}{_on(ray) if word == 'resume' else ''}")


def _on(ray: str | None) -> str:
    """What says again where a study is to run: it is not stored."""
    return "" if ray is None else f" --ray {shlex.quote(ray)}"


def _run(
    session: Session, display: Display, work: Callable[[Event], "Study"], ray: str | None
) -> None:
    """Run `work` until it ends or is interrupted, and show what came out."""
    resume_line = f" to go on: {session.home.command(f'resume {session.study}')}{_on(ray)}"
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
