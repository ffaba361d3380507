"""What a block hands to the next, for each batch: in memory up to a limit, above it in files."""

from collections.abc import Callable
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import torch
from torch import Tensor

MEMORY_BYTES = 1 << 29


class Activations:
    """Outputs of one block by the number of the batch.

    Files have no name any more when they are mapped: whatever ends the process, they are gone.
    """

    def __init__(self, folder: Path, memory_bytes: int = MEMORY_BYTES) -> None:
        """Starts empty.

        Args:
            folder: where files are made; it is there.
            memory_bytes: what may be held in memory; all above is in files.
        """
        self._folder = folder
        self._memory_bytes = memory_bytes
        self._outputs: dict[int, Any] = {}
        self._held: dict[int, int] = {}

    @property
    def held_bytes(self) -> int:
        """Bytes of the tensors that are in memory."""
        return sum(self._held.values())

    def put(self, batch: int, output: Any) -> None:
        """Keep a block's output: a tensor, or a nested tuple, list or dict of tensors.

        Raises:
            OSError: the disk is full or the folder cannot be written.
        """
        size = sum(tensor.nbytes for tensor in leaves(output))
        if self.held_bytes + size <= self._memory_bytes:
            self._held[batch] = size
            self._outputs[batch] = output
        else:
            self._outputs[batch] = changed(output, self._filed)

    def take(self, batch: int) -> Any:
        """An output with the same bits and strides as it was put, to be kept here no longer."""
        self._held.pop(batch, None)
        return self._outputs.pop(batch)

    def clear(self) -> None:
        """Forget everything."""
        self._outputs.clear()
        self._held.clear()

    def _filed(self, tensor: Tensor) -> Tensor:
        dense = tensor.clone()
        if dense.numel() == 0:
            return dense
        flat = dense.as_strided((dense.numel(),), (1,))
        with NamedTemporaryFile(dir=self._folder, prefix="activations-", suffix=".part") as file:
            # Written, not mapped to be written: a full disk is then an error and no signal.
            file.write(flat.view(torch.uint8).numpy().data)
            file.flush()
            mapped = torch.from_file(file.name, size=dense.numel(), dtype=dense.dtype)
        return mapped.as_strided(dense.shape, dense.stride())


def leaves(output: Any) -> list[Tensor]:
    """The tensors of a nested tuple, list or dict, in their order."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    changed(output, note)
    return found


def changed(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same nest of other tensors; what is neither is left as it is."""
    if isinstance(output, Tensor):
        return change(output)
    if type(output) in (tuple, list):
        return type(output)(changed(item, change) for item in output)
    if type(output) is dict:
        return {name: changed(item, change) for name, item in output.items()}
    return output
