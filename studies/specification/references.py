"""References: where a model, data or a loss comes from, as text."""

import os
import re
from pathlib import Path

from apportion.errors import InvalidInput

PYTHON, TEXT, HUB = "python:", "text:", "hf:"
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?(?:@\w+)?")
LOSSES = ("kl", "perplexity", "accuracy")


def check_model(text: str) -> str:
    """`text`, if it has the form of a model reference. Raises InvalidInput."""
    if text.startswith(PYTHON):
        return _check_python(text)
    if text.startswith(TEXT) or not text.removeprefix(HUB).strip():
        raise InvalidInput(
            f'"{text}" is no model; write hf:ORG/NAME, a folder, or python:file.py:function'
        )
    return text


def check_data(text: str) -> str:
    """`text`, if it has the form of a data reference. Raises InvalidInput."""
    if text.startswith(PYTHON):
        return _check_python(text)
    if not text.startswith(TEXT) or text == TEXT:
        guess = text.removeprefix(HUB) or "corpus"
        raise InvalidInput(
            f'"{text}" is no data; write "text:{guess.removeprefix(TEXT) or "corpus"}" '
            "(a file or folder of documents) or python:file.py:function"
        )
    return text


def check_loss(text: str) -> str:
    """`text`, if it names a loss or a function. Raises InvalidInput."""
    if text.startswith(PYTHON):
        return _check_python(text)
    if text not in LOSSES:
        raise InvalidInput(
            f'"{text}" is no loss; known: {", ".join(LOSSES)}, or python:file.py:function'
        )
    return text


def absolute(text: str, folder: Path) -> str:
    """`text` with its path made absolute from `folder`; names of hub and modules stay.

    A model folder, with or without `hf:`, becomes "hf:/absolute/folder".
    """
    if text.startswith(PYTHON):
        target, _, function = text.removeprefix(PYTHON).rpartition(":")
        return f"{PYTHON}{absolute_path(target, folder)}:{function}" if _is_file(target) else text
    if text.startswith(TEXT):
        return TEXT + absolute_path(text.removeprefix(TEXT), folder)
    name = text.removeprefix(HUB)
    path = absolute_path(name, folder)
    return HUB + (path if _is_model_folder(text, path) else name)


def absolute_path(path: str, folder: Path) -> str:
    """`path` from `folder`, without "..", "~" expanded."""
    return os.path.normpath(folder.absolute() / Path(path).expanduser())


def missing(text: str) -> str | None:
    """What a well-formed absolute reference names that is not there; None if all is well."""
    if text.startswith(PYTHON):
        target = text.removeprefix(PYTHON).rpartition(":")[0]
        return f"no file {target}" if _is_file(target) and not Path(target).is_file() else None
    if text.startswith(TEXT):
        path = text.removeprefix(TEXT)
        return None if Path(path).exists() else f"no file or folder {path}"
    name = text.removeprefix(HUB)
    if name.startswith("/"):
        return None if Path(name).is_dir() else f"no folder {name}"
    if HUB_NAME.fullmatch(name) is None:
        return (
            f'"{name}" is neither a folder nor the name of a model on the hub (ORG/NAME, '
            "ORG/NAME@COMMIT)"
        )
    return None


def _is_file(target: str) -> bool:
    return target.endswith(".py") or "/" in target


def _is_model_folder(text: str, path: str) -> bool:
    looks_like_path = text.startswith((".", "/", "~")) or not text.startswith(HUB)
    return looks_like_path or Path(path).is_dir() or text[len(HUB) :].startswith((".", "/", "~"))


def _check_python(text: str) -> str:
    target, _, function = text.removeprefix(PYTHON).rpartition(":")
    is_module = all(part.isidentifier() for part in target.split("."))
    if not function.isidentifier() or not (_is_file(target) or is_module):
        raise InvalidInput(
            f'"{text}" names no function; write python:file.py:function '
            "or python:package.module:function"
        )
    return text
