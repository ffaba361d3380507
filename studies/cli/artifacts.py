"""Commands for what a study is for: export, verify."""

from pathlib import Path
from typing import Annotated

import typer

from apportion.errors import ApportionError, InvalidInput
from apportion.studies.cli.beginning import Json
from apportion.studies.cli.reports import verification_line
from apportion.studies.cli.running import Name
from apportion.studies.cli.session import Session
from apportion.units import format_bytes


def export(
    context: typer.Context,
    name: Name,
    to: Annotated[Path | None, typer.Option("--to", metavar="FOLDER", help="A new folder.")] = None,
    trial: Annotated[
        int | None, typer.Option(metavar="N", help="Another point than the winner: its number.")
    ] = None,
    optuna: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Add finished trials to an Optuna database instead."),
    ] = None,
    evopress: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="A new folder, as EvoPress keeps what it found."),
    ] = None,
) -> None:
    """Write the winner, or another point of the front, as a folder."""
    from apportion.studies.database.location import without_password
    from apportion.studies.study import Study

    if [to, optuna, evopress].count(None) != 2:
        raise InvalidInput(
            "say where to: --to FOLDER for an artifact, --optuna URL for trials, or --evopress "
            "FOLDER for EvoPress"
        )
    session = context.ensure_object(Session)
    study = Study.open(name, session.home, session.home.database)
    session.study = name
    with session.working(study.spec.objective.threads) as display:
        if optuna is not None:
            added = study.export_optuna(optuna)
            plural, place = "" if added == 1 else "s", without_password(optuna)
            display.line(f" exported  {added} finished trial{plural} to {place}")
            return
        if evopress is not None:
            folder = study.export_evopress(evopress, trial=trial)
        elif to is not None:
            folder = study.export(to, trial=trial)
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        display.line(f" exported  {folder} ({format_bytes(size)})")


def verify(
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="An exported folder.")],
    as_json: Json = False,
) -> None:
    """Load an exported folder in a fresh process; compare its loss and its latency."""
    session = context.ensure_object(Session)
    with session.working() as display:
        from apportion.studies import verification

        found = verification.verify(folder)
        if as_json:
            display.json(found)
        elif found["ok"]:
            display.line(verification_line(found))
    if not found["ok"]:
        raise ApportionError(f"{folder} is not what was promised: {found['reason']}")
