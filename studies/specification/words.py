"""What is wrong with a study file, in the words of the one who wrote it."""

import difflib
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from apportion.studies.specification import sections

TABLES: dict[str, type[BaseModel]] = {
    "study": sections.StudySection,
    "model": sections.ModelSection,
    "data": sections.DataSection,
    "objective": sections.ObjectiveSection,
    "space": sections.SpaceEntry,
    "search": sections.SearchSection,
}
TOP = (*TABLES, "devices", "limits")
EXAMPLES = {
    "model": '[model] with source = "hf:ORG/NAME"',
    "data": '[data] with source = "text:corpus"',
    "source": 'source = "hf:ORG/NAME"',
    "sites": 'sites = "*"',
    "options": 'options = ["dense", "w8", "w4g64"]',
    "phase": 'phase = "prefill"',
}
WANTED = {
    "string_type": "a text in quotes",
    "int_type": "a whole number",
    "bool_type": "true or false",
    "tuple_type": "a list [...]",
    "dict_type": "a table",
    "model_type": "a table",
    "model_attributes_type": "a table",
}
Location = tuple[int | str, ...]


def explain(error: ValidationError) -> list[str]:
    """A line for each problem: where, what, what would be right."""
    lines = []
    for problem in error.errors(include_url=False):
        place, value = problem["loc"], problem["input"]
        if place and isinstance(place[-1], int) and not isinstance(value, dict):
            place = place[:-1]
        message = _message(problem["type"], problem["loc"], value, problem.get("ctx", {}))
        for line in message.splitlines():
            separator = "" if line.startswith((".", ":")) else ": "
            lines.append(f"{written(place)}{separator}{line}")
    return list(dict.fromkeys(lines))


def written(place: Location) -> str:
    """("space", 1, "options") -> "space[2].options": counted from one, as people do."""
    text = ""
    for part in place:
        text += f"[{part + 1}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def shown(value: Any) -> str:
    """A value of the study file, as it may be written there."""
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return "a table"
    if isinstance(value, (list, tuple)):
        return "a list"
    return str(value)


def nearest(word: str, known: list[str]) -> str:
    """Which of the known words was meant, or all of them."""
    near = difflib.get_close_matches(word, known, n=1)
    return f'did you mean "{near[0]}"?' if near else f"known: {', '.join(known)}"


def _message(kind: str, place: Location, value: Any, context: Mapping[str, Any]) -> str:
    if kind == "value_error":
        return str(context["error"])
    if kind == "extra_forbidden":
        return _unknown_key(place)
    if kind == "missing":
        key = str(place[-1])
        return f"missing; write {EXAMPLES.get(key, key + ' = ...')}"
    if kind == "literal_error":
        choices = [c.strip("'") for c in context["expected"].replace(" or ", ", ").split(", ")]
        near = difflib.get_close_matches(str(value), choices, n=1)
        hint = f'; did you mean "{near[0]}"?' if near else ""
        return f"{shown(value)} is none of {', '.join(choices)}{hint}"
    if kind == "greater_than_equal":
        return f"must be at least {context['ge']}, got {value}"
    if kind == "less_than":
        return f"must be below {context['lt']}, got {value}"
    if kind == "too_short":
        return "must not be empty"
    return f"must be {WANTED.get(kind, 'something else')}, got {shown(value)}"


def _unknown_key(place: Location) -> str:
    key = str(place[-1])
    known = _keys(place[:-1])
    if not difflib.get_close_matches(key, known, n=1):
        owners = [name for name, table in TABLES.items() if key in table.model_fields]
        if owners and len(place) > 1:
            return f"unknown key; it belongs into [{owners[0]}]"
    return f"unknown key; {nearest(key, known)}"


def _keys(place: Location) -> list[str]:
    """The keys of the table at `place`."""
    if not place:
        return list(TOP)
    if place[0] == "devices":
        table: type[BaseModel] = sections.Device if len(place) == 2 else sections.RequestEntry
    elif place[-1] in ("tokens", "samples"):
        table = sections.PartSizes
    else:
        table = TABLES[str(place[0])]
    return list(table.model_fields)
