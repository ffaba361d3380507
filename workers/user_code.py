"""The user's functions: found by "python:file.py:function" or "python:package.module:function"."""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any

from apportion.errors import InvalidInput
from apportion.hashing import content_hash, file_hash

PREFIX = "python:"
# A user's code may raise anything, and end the process too; all of it is the user's to mend.
RAISED = (Exception, SystemExit)
TWO_LINES = 'the two lines that work: "def build(): ..." in model.py, and "python:model.py:build"'


@dataclass(frozen=True)
class UserFunction:
    """A function of the user's.

    Attributes:
        source: where it was found, with an absolute path.
        function: the function itself.
        file: the file that defines it.
        hash: content hash of that file.
    """

    source: str
    function: Callable[..., Any]
    file: Path
    hash: str

    def __call__(self, *args: Any) -> Any:
        """Call it.

        Raises:
            InvalidInput: it raised; the line says what and where.
        """
        with _importable(self.file.parent):
            try:
                return self.function(*args)
            except RAISED as error:
                raise InvalidInput(f"{self.source} {raised(error, self.file)}") from error


def load_function(source: str, base: Path, where: str) -> UserFunction:
    """Import the function that `source` names.

    Args:
        source: "python:file.py:function" or "python:package.module:function".
        base: the folder that relative files start from.
        where: the key of the study file, for messages ("model.source").

    Raises:
        InvalidInput: no such file, module or function, or its import raises.
    """
    place, _, name = source.removeprefix(PREFIX).rpartition(":")
    if not place or not name.isidentifier():
        raise InvalidInput(f'{where}: "{source}" names no function; {TWO_LINES}')
    if place.endswith(".py"):
        file = (base / place).resolve()
        if not file.is_file():
            raise InvalidInput(f"{where}: no file {file}; {TWO_LINES}")
        module, resolved = _import_file(file, where), f"{PREFIX}{file}:{name}"
    else:
        module, resolved = _import_module(place, base, where), source
        file = Path(str(module.__file__))
    return UserFunction(resolved, _function_of(module, name, file, where), file, file_hash(file))


def reference_of(function: object, where: str) -> str:
    """The source text of a function object, so that a worker finds it again.

    Raises:
        InvalidInput: a lambda, a notebook's function or one defined inside another.
    """
    name = getattr(function, "__qualname__", "")
    module = sys.modules.get(getattr(function, "__module__", None) or "")
    file = getattr(module, "__file__", None)
    if not name.isidentifier() or file is None or getattr(module, name, None) is not function:
        raise InvalidInput(f"{where}: no worker can import {name or function!r}; {TWO_LINES}")
    return f"{PREFIX}{Path(file).resolve()}:{name}"


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """The folder first on the import path; afterwards last, lest it hide installed packages."""
    path = str(folder)
    if path in sys.path:
        sys.path.remove(path)
    sys.path.insert(0, path)
    try:
        yield
    finally:
        if path in sys.path:
            sys.path.remove(path)
        sys.path.append(path)


def _import_file(file: Path, where: str) -> ModuleType:
    # A name of its own: the user's "random.py" must not become the module "random".
    name = f"apportion_user_{file.stem}_{content_hash([str(file), file_hash(file)])[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    specification = importlib.util.spec_from_file_location(name, file)
    if specification is None or specification.loader is None:
        raise InvalidInput(f"{where}: {file} is no Python file; {TWO_LINES}")
    module = importlib.util.module_from_spec(specification)
    sys.modules[name] = module
    with _importable(file.parent):
        try:
            specification.loader.exec_module(module)
        except RAISED as error:
            del sys.modules[name]
            raise InvalidInput(f"{where}: importing {file} {raised(error, file)}") from error
    return module


def _import_module(name: str, base: Path, where: str) -> ModuleType:
    with _importable(base):
        try:
            module = importlib.import_module(name)
        except RAISED as error:
            raise InvalidInput(f"{where}: importing {name} {raised(error, None)}") from error
    if getattr(module, "__file__", None) is None:
        raise InvalidInput(f"{where}: {name} is a folder, not a module; {TWO_LINES}")
    return module


def file_of(source: str) -> Path | None:
    """The file that a resolved source names; None where it names a module, or no code."""
    place = source.removeprefix(PREFIX).rpartition(":")[0]
    return Path(place) if source.startswith(PREFIX) and place.endswith(".py") else None


def _function_of(module: ModuleType, name: str, file: Path, where: str) -> Callable[..., Any]:
    function = getattr(module, name, None)
    if callable(function):
        return function  # type: ignore[no-any-return]
    if function is not None:
        raise InvalidInput(f"{where}: {name} in {file.name} is no function; {TWO_LINES}")
    known = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
    near = get_close_matches(name, known, n=1)
    hint = f'; did you mean "{near[0]}"?' if near else f"; {TWO_LINES}"
    raise InvalidInput(f'{where}: {file.name} has no function "{name}"{hint}')


def raised(error: BaseException, file: Path | None) -> str:
    """What was raised, and the deepest line of the user's file that led there."""
    line = None
    trace = error.__traceback__
    while trace is not None:
        if file is not None and trace.tb_frame.f_code.co_filename == str(file):
            line = trace.tb_lineno
        trace = trace.tb_next
    message = " ".join(str(error).split())
    place = f" at {file.name}, line {line}" if file is not None and line else ""
    return f"raised {type(error).__name__}: {message}{place}"
