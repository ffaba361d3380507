"""Commands before a study: init, sites, check."""

from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from apportion.errors import InvalidInput
from apportion.studies.cli.records import SiteRow
from apportion.studies.cli.reports import show_check, site_counts
from apportion.studies.cli.session import Session, naming
from apportion.studies.initial import init_file
from apportion.studies.specification import StudySpec, load, references

StudyFile = Annotated[Path, typer.Argument(metavar="STUDY", help="A study file.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="hf:ORG/NAME, a folder, or python:file.py:function.",
        show_default=False,
    ),
]


def init(
    model: Model,
    to: Annotated[Path, typer.Option("--to", help='Where to; "-" prints it.')] = Path("study.toml"),
) -> None:
    """Write a commented study file for a model."""
    known_model(model)
    if str(to) == "-":
        print(init_file(model), end="")
        return
    if to.absolute().parent != Path.cwd():
        model = references.absolute(model, Path.cwd())
    text = init_file(model, str(to))
    try:
        with to.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        raise InvalidInput(f"{to}: is already there; name another file with --to") from error
    except OSError as error:
        raise InvalidInput(f"{to}: cannot be written: {error.strerror}") from error
    print(f" wrote {to}; set its [data] and [limits], then: apportion check {to}")


def sites(
    context: typer.Context,
    model: Annotated[
        str, typer.Argument(metavar="MODEL_OR_STUDY", help="A model or a study file.")
    ],
    as_json: Json = False,
) -> None:
    """List the sites of a model, or of a study with their options."""
    source: str | StudySpec = load(model) if model.endswith(".toml") else known_model(model)
    threads = source.objective.threads if isinstance(source, StudySpec) else None
    with context.ensure_object(Session).working(threads) as display:
        from apportion.studies import study

        rows: list[SiteRow] = study.sites(source)
        if as_json:
            display.json(rows)
            return
        columns = ["site", "kind", "layers", "weights", "options", "note"]
        cells = [
            [
                row["name"],
                row["kind"],
                str(row["layers"] or "-"),
                f"{row['weights']:,}" if row["weights"] else "-",
                " ".join(row["options"]),
                row["note"],
            ]
            for row in rows
        ]
        display.table(columns, cells, [site_counts(Counter(row["kind"] for row in rows))])


def check(context: typer.Context, study_file: StudyFile, as_json: Json = False) -> None:
    """Check a study file against its model and data, and say what the study would cost."""
    spec = load(study_file)
    session = context.ensure_object(Session)
    session.study = spec.study.name
    with session.working(spec.objective.threads) as display:
        from apportion.studies import study

        with naming(study_file):
            report = study.check(spec, session.home)
        if as_json:
            display.json(report)
        else:
            show_check(display, report)


def known_model(text: str) -> str:
    """The absolute reference of a model given on the command line. Raises InvalidInput."""
    reference = references.absolute(references.check_model(text), Path.cwd())
    reason = references.missing(reference)
    if reason is not None:
        raise InvalidInput(f"{text}: {reason}")
    return reference
