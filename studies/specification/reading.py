"""Reading a study file."""

import re
import tomllib
from pathlib import Path
from typing import Any

from apportion.errors import InvalidInput
from apportion.studies.specification.study_spec import StudySpec, absolute_tables, missing_files

HOW_TO_BEGIN = '"apportion init MODEL" writes one'
POSITION = re.compile(r"(.*) \((at line \d+, column \d+|at end of document)\)", re.DOTALL)
KEY_PATH = re.compile(r"\('[^()]*\)")


def load(path: str | Path) -> StudySpec:
    """The specification in the study file `path`; its relative paths are taken from its folder.

    Raises:
        InvalidInput: a line for each problem, all at once, each opening with the file's name.
    """
    tables = read_tables(path)
    folder = Path(path).absolute().parent
    if isinstance(study := tables.setdefault("study", {}), dict):
        study.setdefault("name", _name_of(Path(path).absolute()))
    tables = absolute_tables(tables, folder)
    problems = missing_files(tables)
    try:
        spec = StudySpec(**tables)
    except InvalidInput as error:
        problems = [*str(error).splitlines(), *problems]
    if problems:
        raise InvalidInput("\n".join(f"{path}: {problem}" for problem in problems))
    return spec


def read_tables(path: str | Path) -> dict[str, Any]:
    """The raw tables of a TOML file. Raises InvalidInput."""
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError as error:
        raise InvalidInput(f"{path}: no such file; {HOW_TO_BEGIN}") from error
    except IsADirectoryError as error:
        inside = Path(path) / "study.toml"
        hint = f'did you mean "{inside}"?' if inside.is_file() else "name the study file in it"
        raise InvalidInput(f"{path}: is a folder; {hint}") from error
    except OSError as error:
        raise InvalidInput(f"{path}: cannot be read: {error.strerror}") from error
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidInput(
            f"{path}: is no text file; a study file is TOML in UTF-8 (byte {error.start + 1})"
        ) from error
    if "\0" in text:
        raise InvalidInput(f"{path}: is no text file; a study file is TOML in UTF-8")
    if not text.strip():
        raise InvalidInput(f"{path}: is empty; {HOW_TO_BEGIN}")
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InvalidInput(f"{path}: {_syntax(str(error))}") from error
    except RecursionError as error:
        raise InvalidInput(f"{path}: is nested too deeply to be a study file") from error


def _syntax(message: str) -> str:
    """ "Invalid value (at line 3, column 5)" -> "line 3, column 5: invalid value"."""
    match = POSITION.fullmatch(message)
    what, where = (match[1], match[2].removeprefix("at ")) if match else (message, "TOML")
    what = KEY_PATH.sub(lambda key: "[" + ".".join(re.findall(r"'([^']*)'", key[0])) + "]", what)
    return f"{where}: {what[:1].lower()}{what[1:]}"


def _name_of(path: Path) -> str:
    """A study without a name is called like its file, and "study.toml" like its folder."""
    name = path.parent.name if path.stem == "study" else path.stem
    return re.sub(r"[^a-z0-9._-]+", "-", name.lower()).strip("-._")[:64] or "study"
