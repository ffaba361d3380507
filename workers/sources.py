"""Models and data from the references of a study file."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from apportion.errors import InvalidInput
from apportion.hashing import content_hash, tensors_hash
from apportion.kernels.formats import DTYPES
from apportion.spaces.batches import Batch, frozen
from apportion.spaces.kernel_sizes import make_kernels_plain
from apportion.workers import hugging_face, text, user_code
from apportion.workers.samples import PARTS, Part, Samples, named_tensors, windows_in

DATA_SIGNATURE = "def data(part: str) -> Sequence[batch]; a batch is a dict, a tuple or a tensor"


@dataclass(frozen=True)
class OpenedModel:
    """A model ready for work, in evaluation mode and without gradients.

    Attributes:
        model: the module.
        tokenizer: a transformers tokenizer, or None.
        revision: a hub commit, or a content hash of what was loaded.
        source: finds the same model again from any folder.
        is_causal_lm: `hf:` models predict the next token.
    """

    model: nn.Module
    tokenizer: Any
    revision: str
    source: str
    is_causal_lm: bool


def open_model(source: str, dtype: str, base: Path, trust_remote_code: bool = False) -> OpenedModel:
    """Load a model.

    Args:
        source: "hf:NAME_OR_FOLDER", "python:file.py:function", "python:module:function" or a
            folder in the Hugging Face format.
        dtype: "float32", "bfloat16" or "float16".
        base: the folder that relative paths start from.
        trust_remote_code: lets transformers run code that comes with the model.

    Raises:
        InvalidInput: no model there, or one that cannot be loaded.
    """
    if dtype not in DTYPES:
        raise InvalidInput(f'model.dtype: "{dtype}" is not one of {", ".join(DTYPES)}')
    if source.startswith(user_code.PREFIX):
        return _open_python_model(source, dtype, base)
    kind, colon, _ = source.partition(":")
    if colon and kind.isalpha() and kind != "hf" and not (base / source).exists():
        raise InvalidInput(f'model.source: "{source}" begins with neither hf: nor python:')
    name = source.removeprefix(hugging_face.PREFIX)
    checkpoint = hugging_face.find_checkpoint(name, base, trust_remote_code)
    model, tokenizer = hugging_face.load_checkpoint(checkpoint, dtype, trust_remote_code)
    return OpenedModel(frozen(model), tokenizer, checkpoint.revision, checkpoint.source, True)


def open_data(
    section: Mapping[str, Any], part: Part, tokenizer: Any, base: Path, seed: int = 0
) -> Samples:
    """The windows of one part.

    Args:
        section: `[data]` of a study file: `source`, or one of them for each part; `context` and
            `tokens` of each part for text, `samples` of each part (optional) for python.
        part: "calibration", "search" or "heldout".
        tokenizer: the model's, needed for text.
        base: the folder that relative paths start from.
        seed: shuffles the windows, so that each first few of them stand for all.

    Raises:
        InvalidInput: the source gives nothing usable for this part.
    """
    source, shared = _source_of(section, part)
    order = np.random.default_rng([seed, PARTS.index(part)])
    if source.startswith(user_code.PREFIX):
        return _open_python_data(section, source, part, base, order)
    path = (base / source.removeprefix(text.PREFIX)).expanduser().resolve()
    return _open_text(section, path, part, tokenizer, order, PARTS if shared else (part,))


def _open_python_model(source: str, dtype: str, base: Path) -> OpenedModel:
    build = user_code.load_function(source, base, "model.source")
    with torch.random.fork_rng(devices=[]):
        # Weights that the function leaves random must be the same in every worker.
        torch.manual_seed(0)
        model = build()
    if not isinstance(model, nn.Module):
        raise InvalidInput(
            f"model.source: {build.source} returned {type(model).__name__}, not an nn.Module; "
            "its signature is def build() -> nn.Module"
        )
    model = model.to(DTYPES[dtype])
    # Of what was given, not of products of it, whose last bits differ from machine to machine.
    revision = content_hash([build.hash, tensors_hash(dict(model.state_dict()))])
    return OpenedModel(frozen(make_kernels_plain(model)), None, revision, build.source, False)


def _source_of(section: Mapping[str, Any], part: Part) -> tuple[str, bool]:
    """The source of a part, and whether the parts share it."""
    own = section.get(part)
    source = own.get("source") if isinstance(own, Mapping) else own
    if source is None:
        source = section.get("source")
    if not isinstance(source, str):
        raise InvalidInput(f'data: no source for {part}; write source = "text:FOLDER"')
    if not source.startswith((text.PREFIX, user_code.PREFIX)):
        raise InvalidInput(f'data.source: "{source}" begins with neither text: nor python:')
    return source, own is None


def _open_text(
    section: Mapping[str, Any],
    path: Path,
    part: Part,
    tokenizer: Any,
    order: np.random.Generator,
    sharing: Sequence[Part],
) -> Samples:
    if tokenizer is None:
        raise InvalidInput(
            f"data.source: text needs a tokenizer, and the model brings none; with a python: "
            f'model write "python:data.py:data" and {DATA_SIGNATURE}'
        )
    context = int(section["context"])
    wanted = {name: _wanted_windows(section, name, context) for name in sharing}

    def windows_of(document: text.Document) -> Tensor:
        return text.cut_windows(document, tokenizer, context)

    pieces = text.divide(text.read_documents(path, "data.source"), wanted, windows_of)[part]
    if not pieces:
        raise InvalidInput(
            f"data.source: {path} leaves no window of {context} tokens for {part}; "
            "give more text or a shorter context"
        )
    windows = torch.cat([piece.windows for piece in pieces])
    numbers = np.repeat(np.arange(len(pieces)), [len(piece.windows) for piece in pieces])
    chosen = order.permutation(len(windows))[: wanted[part]]
    windows = windows[torch.from_numpy(chosen)]
    return Samples(
        batches=[{"input_ids": windows[k : k + 1]} for k in range(len(windows))],
        documents=tuple(int(number) for number in numbers[chosen]),
        hash=tensors_hash({"input_ids": windows}),
        document_hashes=frozenset(piece.hash for piece in pieces),
        note=_shortage(part, len(windows), wanted[part], context),
    )


def _wanted_windows(section: Mapping[str, Any], part: Part, context: int) -> int:
    tokens = section.get("tokens", {}).get(part)
    if tokens is None:
        raise InvalidInput(f"data.tokens.{part}: missing; write how many tokens to use")
    if tokens < context:
        raise InvalidInput(
            f"data.tokens.{part}: {tokens} is less than one window of {context} tokens"
        )
    return int(tokens) // context


def _shortage(part: Part, windows: int, wanted: int, context: int) -> str | None:
    if windows == wanted:
        return None
    return f"{part}: {windows * context:,} of {wanted * context:,} tokens; the text has no more"


def _open_python_data(
    section: Mapping[str, Any], source: str, part: Part, base: Path, order: np.random.Generator
) -> Samples:
    function = user_code.load_function(source, base, "data.source")
    given = function(part)
    if not isinstance(given, Sequence) or isinstance(given, str | bytes):
        raise InvalidInput(
            f"data.source: {function.source} returned {type(given).__name__} for {part}; "
            f"its signature is {DATA_SIGNATURE}"
        )
    batches = [_as_batch(batch, function.source) for batch in given]
    wanted = section.get("samples", {}).get(part)
    batches = [batches[int(place)] for place in order.permutation(len(batches))]
    if wanted is not None:
        batches = _first_windows(batches, int(wanted))
    if not batches:
        raise InvalidInput(f"data.source: {function.source} returned no batch for {part}")
    if not all(map(windows_in, batches)):
        raise InvalidInput(
            f"data.source: {function.source} returned a batch without any window for {part}"
        )
    hashes = [tensors_hash(named_tensors(batch)) for batch in batches]
    return Samples(batches, None, content_hash(hashes), frozenset(hashes), None)


def _as_batch(value: object, source: str) -> Batch:
    # transformers' BatchEncoding is a mapping but no dict.
    items: list[object] = [value]
    if isinstance(value, Mapping):
        items = list(value.values())
    elif isinstance(value, tuple | list):
        items = list(value)
    tensors = [item for item in items if isinstance(item, Tensor)]
    if not tensors or len(tensors) < len(items) or tensors[0].ndim == 0:
        raise InvalidInput(
            f"data.source: {source} gave a batch of {type(value).__name__} that is not made of "
            f"tensors [windows, ...]; its signature is {DATA_SIGNATURE}"
        )
    if isinstance(value, Mapping):
        return dict(zip((str(name) for name in value), tensors, strict=True))
    return tensors[0] if isinstance(value, Tensor) else tuple(tensors)


def _first_windows(batches: Sequence[Batch], wanted: int) -> list[Batch]:
    """Whole batches until there are enough windows; never more than wanted but for the first."""
    taken: list[Batch] = []
    have = 0
    for batch in batches:
        if taken and have + windows_in(batch) > wanted:
            break
        taken.append(batch)
        have += windows_in(batch)
    return taken
