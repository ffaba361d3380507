"""Text as windows of tokens: files, documents, and how one source is cut into disjoint parts."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apportion.errors import InvalidInput
from apportion.hashing import content_hash, file_hash
from apportion.workers.samples import Part

PREFIX = "text:"


@dataclass(frozen=True)
class Document:
    """One file of text. `hash` is of its bytes."""

    path: Path
    hash: str

    def read(self) -> str:
        """Its text, line ends untouched."""
        return self.path.read_bytes().decode("utf-8")


@dataclass(frozen=True)
class Piece:
    """Windows of one document that belong to one part.

    Attributes:
        hash: of the document, or of the range of its windows where it is shared by parts.
        windows: token ids, int64 [windows, context].
    """

    hash: str
    windows: Tensor


def read_documents(path: Path, where: str) -> list[Document]:
    """The documents of a file or folder, each content once, in the order of their hashes.

    Empty and hidden files of a folder are passed over.

    Raises:
        InvalidInput: nothing there, nothing but empty files, or a file that is not UTF-8 text.
    """
    if not path.exists():
        raise InvalidInput(f"{where}: no file or folder {path}")
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    visible = [f for f in files if f == path or not _is_hidden(f.relative_to(path))]
    filled = [f for f in visible if f.stat().st_size > 0]
    if not filled:
        what = "is empty" if path.is_file() else "holds no text; each file is a document"
        raise InvalidInput(f"{where}: {path} {what}")
    for file in filled:
        _check_text(file, where)
    by_hash = {file_hash(file): file for file in filled}
    return [Document(by_hash[key], key) for key in sorted(by_hash)]


def cut_windows(document: Document, tokenizer: Any, context: int) -> Tensor:
    """Windows of one document, int64 [windows, context]; a last, shorter one is left out."""
    # Not verbose: a document longer than the model's context is cut right here.
    tokens = tokenizer(document.read(), add_special_tokens=False, verbose=False)["input_ids"]
    count = len(tokens) // context
    return torch.tensor(tokens[: count * context], dtype=torch.int64).reshape(count, context)


def divide(
    documents: Sequence[Document],
    wanted: Mapping[Part, int],
    windows_of: Callable[[Document], Tensor],
) -> dict[Part, list[Piece]]:
    """Deal documents to parts until each has its windows; no document is in two parts.

    Each document goes to the part that lacks the largest share of what it wants, so a shortage is
    spread evenly. Fewer documents than parts are cut by windows instead.

    Args:
        documents: in an order that does not depend on names or folders.
        wanted: part -> windows.
        windows_of: windows of a document, [windows, context].
    """
    parts: dict[Part, list[Piece]] = {part: [] for part in wanted}
    if len(documents) < len(wanted):
        for document in documents:
            for part, piece in _cut_document(document, wanted, windows_of(document)).items():
                parts[part].append(piece)
        return parts
    have = dict.fromkeys(wanted, 0)
    for document in documents:
        part = max(wanted, key=lambda name: 1 - have[name] / wanted[name])
        if have[part] >= wanted[part]:
            break
        windows = windows_of(document)
        if len(windows):
            parts[part].append(Piece(document.hash, windows))
            have[part] += len(windows)
    return parts


def _cut_document(
    document: Document, wanted: Mapping[Part, int], windows: Tensor
) -> dict[Part, Piece]:
    pieces: dict[Part, Piece] = {}
    total, before = sum(wanted.values()), 0
    for part, count in wanted.items():
        first = len(windows) * before // total
        before += count
        last = len(windows) * before // total
        if last > first:
            shared = content_hash([document.hash, first, last])
            pieces[part] = Piece(shared, windows[first:last])
    return pieces


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _check_text(file: Path, where: str) -> None:
    content = file.read_bytes()
    if b"\0" in content:
        raise InvalidInput(f"{where}: {file} is binary, not text; each file is a document")
    try:
        content.decode("utf-8")
    except UnicodeDecodeError as error:
        place = f"byte {error.start:,}"
        raise InvalidInput(f"{where}: {file} is not UTF-8 text ({place}); convert it") from error
