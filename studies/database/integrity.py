"""Whether all rows can be read: what is stored packed or as JSON is decoded, one row at a time."""

import json
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Column, Connection, Row, Select, Table, select

from apportion.errors import ApportionError
from apportion.studies.database import encoding, statements, tables
from apportion.studies.database.rows import Layout

ROWS_AT_A_TIME = 100
DAMAGED = (ApportionError, AttributeError, LookupError, TypeError, ValueError, zlib.error)


@dataclass
class Checked:
    """How many rows were read, and what is wrong, a line each."""

    studies: int = 0
    trials: int = 0
    evaluations: int = 0
    problems: list[str] = field(default_factory=list)


def read_all(connection: Connection, checked: Checked) -> list[str]:
    """Decodes every row: counts them into `checked`, returns what cannot be decoded."""
    names: dict[int, str] = {}
    known: dict[int, Layout] = {}
    problems: list[str] = []

    def each(table: Table, decode: Callable[[Row[Any]], object], query: Select[Any]) -> int:
        count = 0
        options = {"yield_per": ROWS_AT_A_TIME}
        for row in connection.execute(query, execution_options=options):
            count += 1
            try:
                decode(row)
            except DAMAGED as error:
                said = " ".join(str(error).split()) or type(error).__name__
                problems.append(f"{_described(table, row, names)}: cannot be read: {said}")
        return count

    def study(row: Row[Any]) -> None:
        names[row.id] = row.name
        encoding.study_of(row)

    def layout(row: Row[Any]) -> None:
        known[row.id] = encoding.layout_of(row.layout)

    checked.studies = each(tables.studies, study, statements.STUDIES)
    each(tables.layouts, layout, select(tables.layouts))
    checked.trials = each(tables.trials, lambda row: _trial(row, known), select(tables.trials))
    checked.evaluations = each(tables.evaluations, _evaluation, select(tables.evaluations))
    for column in _JSON:
        each(column.table, _json(column), select(column.table))
    return problems


_JSON = (
    tables.changes.c.change,
    tables.stage_outputs.c.output,
    tables.solver_answers.c.answer,
    tables.measurements.c.json,
)


def _json(column: Column[str]) -> Callable[[Row[Any]], object]:
    return lambda row: json.loads(getattr(row, column.name))


def _trial(row: Row[Any], known: Mapping[int, Layout]) -> None:
    if row.layout_id not in known:
        raise ApportionError("its layout is missing or damaged")
    encoding.trial_of(row, known)


def _evaluation(row: Row[Any]) -> None:
    found = encoding.evaluation_of(row)
    if found.failure is None and found.losses is None:
        raise ApportionError("is neither a result nor a failure")
    lengths = {None if part is None else len(part) for part in (found.losses, found.weights)}
    if len(lengths) != 1:
        raise ApportionError("has not as many weights as losses")


def _described(table: Table, row: Row[Any], names: Mapping[int, str]) -> str:
    """ "trials (study tiny, number 5)"."""
    if table is tables.studies:
        return f"studies ({row.name})"
    parts = []
    for column in table.primary_key:
        value = getattr(row, column.name)
        if column.name == "study_id":
            parts.append(f"study {names.get(value, value)}")
        else:
            parts.append(f"{column.name} {value.hex() if isinstance(value, bytes) else value}")
    return f"{table.name} ({', '.join(parts)})"
