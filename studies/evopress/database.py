"""Databases of EvoPress and of the GGUF toolkit: dense weights in `MODULE/LEVEL.pth`.

Each file is a `torch.save` of one dense tensor `[out, in]`: the weights as the level leaves them,
not their codes (IST-DASLab/EvoPress, src/quantizer.py and src/pruner.py; IST-DASLab/
gptq-gguf-toolkit, mapper/gguf_splitter.py, the folder `layers-hf`). `.pth` files are pickles, which
can run code: here they are read with torch's `weights_only` alone, which runs none.
"""

import io
import pickle
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apportion.errors import InvalidInput
from apportion.files import write_whole
from apportion.studies.evopress.levels import LEVEL, MODULE
from apportion.studies.evopress.scales import SparsityLevels

METADATA = "metadata.pth"
GGUF_CODES, GGUF_DENSE = "layers-gguf", "layers-hf"


@dataclass(frozen=True)
class Database:
    """What a folder of dense weights offers.

    Attributes:
        folder: where the modules' folders lie.
        levels: module -> its levels, the least first.
    """

    folder: Path
    levels: Mapping[str, tuple[str, ...]]

    def tensor(self, module: str, level: str) -> Tensor:
        """The dense weights `[out, in]` of a module at a level, mapped from the file.

        Raises:
            InvalidInput: no such module or level, or the file is no plain dense matrix.
        """
        if level not in self.levels.get(module, ()):
            known = ", ".join(self.levels.get(module, ())) or "the module is not there"
            raise InvalidInput(f"{self.folder} has no level {level} of {module}; levels: {known}")
        path = self.folder / module / f"{level}.pth"
        if self.folder.name == GGUF_CODES:
            dense = self.folder.with_name(GGUF_DENSE)
            raise InvalidInput(f"{path} holds GGUF's codes; dense weights are in {dense}")
        return _dense(_load(path), path)


def open_database(folder: Path) -> Database:
    """The modules and levels of a folder; no file is read.

    Raises:
        InvalidInput: the folder is not there or holds no module, or a `.pth` file of a module's
            folder has no level's name.
    """
    if not folder.is_dir():
        raise InvalidInput(f"{folder} is no folder")
    levels: dict[str, list[str]] = {}
    for file in folder.glob("*/*.pth"):
        if LEVEL.fullmatch(file.stem) is None:
            raise InvalidInput(f"{file} is no level; files are named 3.pth or 2.5625-Q2_K.pth")
        levels.setdefault(file.parent.name, []).append(file.stem)
    if not levels:
        raise InvalidInput(
            f"{folder} holds no MODULE/LEVEL.pth; a quantization database is named MODEL/3bit, "
            f"one of the GGUF toolkit {GGUF_DENSE}"
        )
    return Database(folder, {m: tuple(sorted(found, key=_number)) for m, found in levels.items()})


def _number(level: str) -> tuple[Decimal, str]:
    number, _, name = level.rpartition("-")
    return (Decimal(number), name) if number else (Decimal(level), "")


def read_sparsity_levels(folder: Path) -> SparsityLevels:
    """What the levels of a sparsity database mean, from its `metadata.pth`.

    Raises:
        InvalidInput: the file cannot be read or lacks a number.
    """
    path = folder / METADATA
    metadata = _load(path)
    wanted = {"sparsity": float, "weights_diff": int, "num_levels": int}
    for name, kind in wanted.items():
        if not isinstance(metadata, dict) or type(metadata.get(name)) is not kind:
            raise InvalidInput(f"{path} holds no {kind.__name__} {name}")
    try:
        return SparsityLevels(**{name: metadata[name] for name in wanted})
    except InvalidInput as error:
        raise InvalidInput(f"{path}: {error}") from None


def write_database(
    folder: Path,
    weights: Iterable[tuple[str, str, Tensor]],
    metadata: SparsityLevels | None = None,
) -> None:
    """Write a database, one matrix at a time.

    Args:
        folder: must not exist yet.
        weights: (module, level, dense weights `[out, in]`).
        metadata: of a sparsity database; written last.

    Raises:
        InvalidInput: the folder exists, a name or a tensor cannot be one of a database, or a
            module has a level twice.
    """
    if folder.exists():
        raise InvalidInput(f"{folder} exists already; choose another folder or remove it")
    for module, level, tensor in weights:
        path = folder / module / f"{level}.pth"
        if MODULE.fullmatch(module) is None or LEVEL.fullmatch(level) is None:
            raise InvalidInput(f'"{module}" and "{level}" are no module and level')
        if path.exists():
            raise InvalidInput(f"{module} has level {level} twice")
        # torch.save would write all that a view was cut from
        _save(path, _dense(tensor.cpu().clone(), path))
    if metadata is not None:
        _save(folder / METADATA, asdict(metadata))


def _save(path: Path, value: Any) -> None:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    write_whole(path, buffer.getvalue())


def _load(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except OSError as error:
        raise InvalidInput(f"{path} cannot be read: {error.strerror or error}") from error
    except pickle.UnpicklingError as error:  # torch's words advise to run the file's code
        raise InvalidInput(f"{path} asks for more than plain tensors; nothing of it ran") from error
    # a damaged file raises anything out of torch's reader
    except Exception as error:
        told = str(error).partition("\n")[0]
        raise InvalidInput(
            f"{path} cannot be read as a file that torch.save writes since 1.6: {told}"
        ) from error


def _dense(value: Any, path: Path) -> Tensor:
    if not isinstance(value, Tensor):
        raise InvalidInput(f"{path} holds {type(value).__name__}, not one dense tensor")
    tensor = value.detach()
    plain = tensor.layout == torch.strided and tensor.device.type == "cpu"
    if not plain or not tensor.is_floating_point() or tensor.ndim != 2:
        found = f"{tensor.layout} {tensor.dtype} of {tensor.ndim} dimensions"
        raise InvalidInput(f"{path} holds {found}; dense floating-point [out, in] is needed")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise InvalidInput(f"{path} repeats the same weights; each needs a place of its own")
    return tensor
