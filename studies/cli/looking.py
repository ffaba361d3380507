"""Commands that only read the database: status, list, show."""

from pathlib import Path
from typing import Annotated

import typer

from apportion.studies.cli.beginning import Json
from apportion.studies.cli.following import follow_status
from apportion.studies.cli.reports import number, show_front, status_line, tokens
from apportion.studies.cli.running import Name
from apportion.studies.cli.session import Session


def status(
    context: typer.Context,
    name: Name,
    follow: Annotated[
        bool, typer.Option("--follow", help="Say it again and again until the study ends.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Say how far a study is."""
    from apportion.studies.study import Study

    session = context.ensure_object(Session)
    study = Study.open(name, session.home, session.home.database)
    if follow:
        found = follow_status(study.status, as_json)
    else:
        found = study.status()
    display = session.display()
    if as_json:
        if not follow:
            display.json(found)
    else:
        display.line(status_line(found))
        if found["state"] == "interrupted":
            display.line(f" to go on: {session.home.command(f'resume {name}')}")
    if follow and found["state"] == "failed":
        raise typer.Exit(1)


def list_(context: typer.Context, as_json: Json = False) -> None:
    """List the studies."""
    session = context.ensure_object(Session)
    display = session.display()
    from apportion.studies.study import list_studies

    rows = list_studies(session.home, session.home.database)
    if as_json:
        display.json(rows)
        return
    if not rows:
        display.line(f" no studies in {session.home.path}")
        return
    cells = [
        [row["name"], row["state"], row["stage"] or "-", tokens(row), number(row["best_loss"])]
        + [row["created"][:16].replace("T", " ")]
        for row in rows
    ]
    columns = ["study", "state", "stage", "budget", "best loss", "submitted"]
    display.table(columns, cells, [f"home {session.home.path}"])


def show(
    context: typer.Context,
    name: Name,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the front, as FILE.png.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show the front of a study, its winner and the uniform rivals."""
    from apportion.studies.study import Study

    session = context.ensure_object(Session)
    study = Study.open(name, session.home, session.home.database)
    session.study = name
    report = study.show()
    if as_json:
        session.display().json(report)
    else:
        show_front(session.display(), report)
    if plot is not None:
        with session.working() as display:
            study.plot(plot)
            if not as_json:
                display.line(f" picture   {plot}")
