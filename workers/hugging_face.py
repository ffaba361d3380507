"""Causal language models in the Hugging Face format: a folder, or a name on the hub."""

import re
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from safetensors import SafetensorError
from torch import nn

from apportion.errors import InvalidInput
from apportion.hashing import content_hash, file_hash
from apportion.kernels.formats import DTYPES

PREFIX = "hf:"
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?(@[\w.-]+)?")
FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
CODE = ["*.py"]
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
# What transformers raises for a folder that it cannot load.
UNLOADABLE = (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError)


@dataclass(frozen=True)
class Checkpoint:
    """A folder with a model. `source` finds it again; `revision` is a commit or a content hash."""

    folder: Path
    source: str
    revision: str


def find_checkpoint(name: str, base: Path, trust_remote_code: bool) -> Checkpoint:
    """The folder of a model, fetched from the hub where it is a name there.

    Raises:
        InvalidInput: no such folder, or the hub does not give it.
    """
    folder = (base / name).expanduser().resolve()
    if folder.is_dir():
        if not any(folder.glob("*.safetensors")):
            raise InvalidInput(
                f"model.source: {folder} holds no .safetensors file; other formats can execute "
                "code and are not loaded; convert it with save_pretrained"
            )
        return Checkpoint(folder, f"{PREFIX}{folder}", _folder_hash(folder))
    if not HUB_NAME.fullmatch(name):
        raise InvalidInput(f"model.source: no folder {folder}")
    return _fetch(name, trust_remote_code)


def load_checkpoint(
    checkpoint: Checkpoint, dtype: str, trust_remote_code: bool
) -> tuple[nn.Module, Any]:
    """The model, and its tokenizer (None where the folder has none).

    Raises:
        InvalidInput: transformers is not installed, or cannot load the folder.
    """
    transformers = _transformers()
    options = {"trust_remote_code": trust_remote_code, "local_files_only": True}
    try:
        model, loaded = transformers.AutoModelForCausalLM.from_pretrained(
            checkpoint.folder,
            dtype=DTYPES[dtype],
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
        tokenizer = None
        if any((checkpoint.folder / name).is_file() for name in TOKENIZER_FILES):
            tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint.folder, **options)
    except UNLOADABLE as error:
        raise InvalidInput(
            f"model.source: {checkpoint.folder} cannot be loaded: {_one_line(error)}"
        ) from error
    if missing := sorted(loaded["missing_keys"]):
        raise InvalidInput(
            f"model.source: {checkpoint.folder} holds no weights for {missing[0]} "
            f"({len(missing)} tensors are missing)"
        )
    return model, tokenizer


def _fetch(name: str, trust_remote_code: bool) -> Checkpoint:
    _transformers()
    from huggingface_hub import snapshot_download

    repository, _, commit = name.partition("@")
    patterns = FILES + (CODE if trust_remote_code else [])
    try:
        path = snapshot_download(repository, revision=commit or None, allow_patterns=patterns)
    except (OSError, ValueError) as error:
        raise InvalidInput(
            f"model.source: no folder {repository}, and the hub does not give a model of that "
            f"name: {_one_line(error)}"
        ) from error
    folder = Path(path)
    return Checkpoint(folder, f"{PREFIX}{repository}@{folder.name}", folder.name)


def _transformers() -> ModuleType:
    try:
        import transformers
    except ImportError as error:
        raise InvalidInput(
            'model.source: hf: needs transformers: pip install "apportion[hf]"'
        ) from error
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers  # type: ignore[no-any-return]


def _folder_hash(folder: Path) -> str:
    files = {file.name: file for pattern in FILES + CODE for file in folder.glob(pattern)}
    return content_hash({name: file_hash(file) for name, file in files.items()})


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else f"{text[:200]} ..."
