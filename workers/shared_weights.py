"""One copy of a model's weights for all processes of a machine: a mapped file in the cache.

What a checkpoint's conversion or the user's function gives is each process's own. Written once,
named by its content, and mapped, its pages are shared by all; writing to them changes no file.
"""

import os
import tempfile
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor, nn

from apportion.hashing import tensors_hash

# As torch aligns its own: sums must come out with the same last bit.
ALIGNMENT = 64


def share_weights(model: nn.Module, folder: Path) -> bool:
    """Put the model's parameters into mapped memory; whether that was possible.

    Their values stay as they are. Where the folder takes no file, the model keeps its own.

    Args:
        model: without gradients, on the processor.
        folder: where the file is, or will be.
    """
    own = {n: p for n, p in model.named_parameters() if p.is_contiguous() and p.nbytes}
    if not own:
        return False
    file = folder / f"weights-{tensors_hash(own)}.bin"
    try:
        if not file.is_file():
            _write(file, own)
        mapped = _mapped(file, own)
    except (OSError, RuntimeError):  # a full disk; a file that is too short
        return False
    if not all(_same(mapped[name], parameter) for name, parameter in own.items()):
        file.unlink(missing_ok=True)  # damaged since: the next one writes it again
        return False
    for name, parameter in own.items():
        parameter.data = mapped[name]
    return True


def _offsets(tensors: dict[str, nn.Parameter]) -> tuple[dict[str, int], int]:
    """Where each tensor begins, and the size of all, in bytes."""
    offsets, size = {}, 0
    for name in sorted(tensors):
        offsets[name] = size
        size += -(-tensors[name].nbytes // ALIGNMENT) * ALIGNMENT
    return offsets, size


def _write(file: Path, tensors: dict[str, nn.Parameter]) -> None:
    """It appears whole or not at all, and without a copy of it in memory."""
    offsets, size = _offsets(tensors)
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=file.parent, suffix=".part") as part:
        part.truncate(size)
        for name, offset in offsets.items():
            part.seek(offset)
            part.write(_bytes(tensors[name]).numpy().data)
        part.flush()
        # Not `replace`: of several writers the first has its file appear, and all map that one.
        with suppress(FileExistsError):
            os.link(part.name, file)


def _mapped(file: Path, tensors: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    offsets, size = _offsets(tensors)
    content = torch.from_file(str(file), shared=False, size=size, dtype=torch.uint8)
    return {
        name: content[offset : offset + tensors[name].nbytes]
        .view(tensors[name].dtype)
        .view(tensors[name].shape)
        for name, offset in offsets.items()
    }


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().flatten().view(torch.uint8)


def _same(one: Tensor, other: Tensor) -> bool:
    return torch.equal(_bytes(one), _bytes(other))
