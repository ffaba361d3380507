"""The specification of a study: all that its result depends on, nothing left open."""

from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ValidationError

from apportion.errors import InvalidInput
from apportion.hashing import content_hash
from apportion.studies.limits import WORST, Limit, limit_problems, parse_limit
from apportion.studies.specification import references, sections
from apportion.studies.specification.defaults import (
    available_windows,
    is_text,
    window_tokens,
    with_defaults,
)
from apportion.studies.specification.words import explain, shown


class StudySpec(sections.Section):
    """A study file, checked and with all its defaults.

    Made from tables (dicts, or the classes of `sections`). Raises InvalidInput with a line for
    each problem.
    """

    study: sections.StudySection
    model: sections.ModelSection
    data: sections.DataSection
    objective: sections.ObjectiveSection
    space: tuple[sections.SpaceEntry, ...]
    devices: dict[str, sections.Device]
    limits: dict[str, str | float]
    search: sections.SearchSection

    def __init__(self, **tables: Any) -> None:
        filled = with_defaults(_plain(tables))
        problems = _problems_across(filled)
        if isinstance(filled["limits"], dict):
            # _problems_across has said it in better words
            filled["limits"] = {k: v for k, v in filled["limits"].items() if _is_scalar(v)}
        try:
            super().__init__(**filled)
        except ValidationError as error:
            problems = [*explain(error), *problems]
        if problems:
            raise InvalidInput("\n".join(problems))

    def to_json(self) -> dict[str, Any]:
        """Plain values; `StudySpec(**spec.to_json())` equals `spec`."""
        return self.model_dump(mode="json", exclude_none=True)

    @property
    def spec_hash(self) -> str:
        """Equal for equal specifications."""
        return content_hash(self.to_json())

    @property
    def parsed_limits(self) -> tuple[Limit, ...]:
        """The limits in the order of the file."""
        return tuple(parse_limit(kind, text) for kind, text in self.limits.items())

    def absolute(self, folder: Path) -> Self:
        """The same with all relative paths taken from `folder`."""
        return type(self)(**absolute_tables(self.to_json(), folder))


def absolute_tables(tables: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The tables with all paths made absolute; values of another kind are left alone."""
    moved = dict(tables)
    for table, key in _reference_places(tables):
        moved[table] = moved[table] | {key: references.absolute(tables[table][key], folder)}
    if isinstance(devices := tables.get("devices"), dict):
        moved["devices"] = {
            name: device | {"file": references.absolute_path(device["file"], folder)}
            if isinstance(device, dict) and isinstance(device.get("file"), str)
            else device
            for name, device in devices.items()
        }
    if files := _start_files(tables):
        start = tables["search"]["start"]
        paths = {name: references.absolute_path(name, folder) for name in files}
        names = [start] if isinstance(start, str) else start
        moved["search"] = moved["search"] | {"start": [paths.get(name, name) for name in names]}
    return moved


def missing_files(tables: dict[str, Any]) -> list[str]:
    """A line for each file or folder that absolute tables name and that is not there."""
    problems = []
    for table, key in _reference_places(tables):
        reason = references.missing(tables[table][key])
        if reason is not None:
            problems.append(f"{table}.{key}: {reason}")
    devices = tables.get("devices")
    for name, device in devices.items() if isinstance(devices, dict) else ():
        file = device.get("file") if isinstance(device, dict) else None
        if isinstance(file, str) and not Path(file).is_file():
            problems.append(f"devices.{name}.file: no file {file}")
    for file in _start_files(tables):
        if Path(file).is_dir():
            problems.append(f"search.start: {file} is a folder; name the file in it")
        elif not Path(file).is_file():
            problems.append(f"search.start: no file {file}")
    return problems


def _start_files(tables: dict[str, Any]) -> list[str]:
    """The files among the start configurations."""
    search = tables.get("search")
    start = search.get("start") if isinstance(search, dict) else None
    names = [start] if isinstance(start, str) else start if isinstance(start, list) else []
    return [name for name in names if isinstance(name, str) and name != sections.OWL]


def _reference_places(tables: dict[str, Any]) -> list[tuple[str, str]]:
    """(table, key) of all references that are well formed."""
    checks = {("model", "source"): references.check_model, ("objective", "loss"): _check_function}
    checks |= {("data", key): references.check_data for key in ("source", *sections.PARTS)}
    places = []
    for (table, key), check in checks.items():
        text = tables[table].get(key) if isinstance(tables.get(table), dict) else None
        try:
            if isinstance(text, str) and check(text):
                places.append((table, key))
        except InvalidInput:
            # said when the table itself is checked
            continue
    return places


def _check_function(text: str) -> str:
    return references.check_loss(text) if text.startswith(references.PYTHON) else ""


def _plain(value: Any) -> Any:
    """Tables as dicts, also where they are given as objects."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json", exclude_none=True)
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def _is_scalar(value: Any) -> bool:
    return isinstance(value, str) or type(value) in (int, float)


def _problems_across(tables: dict[str, Any]) -> list[str]:
    """What is wrong between tables that may each be right."""
    devices = tables["devices"] if isinstance(tables["devices"], dict) else {}
    problems = [problem for name in devices if (problem := _device_name_problem(name))]
    if isinstance(tables["limits"], dict):
        problems += limit_problems(tables["limits"], devices)
    if not tables["space"]:
        problems.append("space: must not be empty; leave it out for the default")
    return problems + _size_problems(tables["search"], tables.get("data"))


def _device_name_problem(name: str) -> str | None:
    if f"latency.{name}" == WORST:
        return f'devices.{name}: "worst" means the slowest of all devices; choose another name'
    if sections.DEVICE.fullmatch(name) is None:
        return f"devices: {shown(name)} is no name; use letters, digits, _ and -"
    return None


def _size_problems(search: Any, data: Any) -> list[str]:
    if not isinstance(search, dict) or not all(
        type(search[key]) is int and search[key] > 0 for key in ("windows", "tokens")
    ):
        return []
    windows, each, most = search["windows"], window_tokens(data), available_windows(data)
    size = f"{windows} windows of {each} tokens" if is_text(data) else f"{windows} samples"
    if most is not None and most < windows:
        key = "tokens" if is_text(data) else "samples"
        return [f"search.windows: {size} do not fit into data.{key}.search; at most {most} do"]
    if search["tokens"] < windows * each:
        return [
            f"search.tokens: {search['tokens']:,} is less than one evaluation ({size}); "
            f"give at least {windows * each:,}, better 100 times that"
        ]
    return []
