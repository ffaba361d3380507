"""The documentation names what exists, and all of it."""

import re
import tomllib
from pathlib import Path
from typing import get_type_hints

import pytest
import typer.main
from pydantic import BaseModel

from apportion.studies.cli import app, records
from apportion.studies.limits import PLAIN_KINDS, WORST
from apportion.studies.specification import StudySpec, sections

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {page.name: page.read_text() for page in PAGES}
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#\s]+)(#[^)\s]*)?\)")
PART = re.compile(r"^`(\w+)`(.*?)(?=^`\w+`|\Z)", re.MULTILINE | re.DOTALL)
TABLES: dict[str, type[BaseModel]] = {
    "`[study]`": sections.StudySection,
    "`[model]`": sections.ModelSection,
    "`[data]`": sections.DataSection,
    "`[objective]`": sections.ObjectiveSection,
    "`[[space]]`": sections.SpaceEntry,
    "`[devices.NAME]`": sections.Device,
    "`[search]`": sections.SearchSection,
}
RECORDS = [value for name, value in vars(records).items() if hasattr(value, "__total__")]


def chapter(text: str, title: str) -> str:
    return text.split(f"\n## {title}\n")[1].split("\n## ")[0]


def rows(text: str) -> set[str]:
    """The words in code marks that stand in the first column of tables."""
    first = (line.split("|")[1] for line in text.splitlines() if line.startswith("| `"))
    return {word for cell in first for word in re.findall(r"`([^`]+)`", cell)}


@pytest.mark.parametrize("title", TABLES)
def test_study_file_page_has_exactly_the_keys(title: str) -> None:
    keys = set(TABLES[title].model_fields)
    if title == "`[devices.NAME]`":
        keys |= set(sections.RequestEntry.model_fields)
    assert rows(chapter(TEXTS["study-file.md"], title)) == keys


def test_study_file_page_has_all_limits() -> None:
    kinds = {*PLAIN_KINDS, WORST, "latency.NAME"}
    assert rows(chapter(TEXTS["study-file.md"], "`[limits]`")) == kinds


def test_whole_study_files_in_pages_are_valid() -> None:
    blocks = [block for page in TEXTS.values() for block in BLOCK.findall(page)]
    tables = [tomllib.loads(text) for language, text in blocks if language == "toml"]
    whole = [table for table in tables if {"model", "data", "limits"} <= set(table)]
    assert [StudySpec(**table).model.source for table in whole]


def test_commands_in_pages_are_those_that_exist() -> None:
    group = typer.main.get_command(app.app)
    known = set(getattr(group, "commands"))  # noqa: B009 (typed as a plain command)
    blocks = [text for language, text in BLOCK.findall(TEXTS["README.md"]) if language == "console"]
    typed = re.findall(r"^\$ \S*apportion (?:--home \S+ )?(\w+)", "\n".join(blocks), re.MULTILINE)
    assert set(typed) == known
    table = TEXTS["outputs.md"].split("\n## ")[0]
    assert {word.split()[0] for word in rows(table)} == known


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_lead_somewhere(page: Path) -> None:
    targets = [target for target, _ in LINK.findall(page.read_text()) if "://" not in target]
    assert [t for t in targets if not (page.parent / t).exists()] == []


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.__name__)
def test_outputs_page_has_exactly_the_fields(record: type) -> None:
    parts = dict(PART.findall(chapter(TEXTS["outputs.md"], "JSON fields")))
    if record.__name__ not in parts:  # small records stand in the cells of the one that holds them
        cells = set(re.findall(r"`(\w+)`", parts["CheckReport"]))
        assert set(get_type_hints(record)) <= cells
        return
    part = parts[record.__name__]
    inherited = re.search(r"the fields of `(\w+)`, and", part)
    fields = rows(part) | (rows(parts[inherited[1]]) if inherited else set())
    assert fields == set(get_type_hints(record))
