"""Input statistics on disk: written a tensor at a time, read a site at a time."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from apportion.files import write_whole
from apportion.spaces.compressors.compose import InputStatistics

COUNT = ":n"
DTYPES = {torch.float64: "F64", torch.int64: "I64"}


def write_statistics(path: Path, sites: Mapping[str, InputStatistics]) -> None:
    """Write a safetensors file, whole or not at all, without a second copy of it in memory.

    A site's second moment has the site's name, its number of tokens that name and ":n".

    Raises:
        OSError: the disk is full or the folder cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    for name, found in sites.items():
        tensors |= {name: found.second_moment, f"{name}{COUNT}": torch.tensor(found.tokens)}
    write_whole(path, _header(tensors), *(t.contiguous().numpy().data for t in tensors.values()))


def _header(tensors: Mapping[str, Tensor]) -> bytes:
    """The length of the header in 8 bytes and the header, as safetensors defines them."""
    entries: dict[str, dict[str, object]] = {}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        shape, offsets = list(tensor.shape), [begin, end]
        entries[name] = {"dtype": DTYPES[tensor.dtype], "shape": shape, "data_offsets": offsets}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def read_statistics(path: Path, site: str) -> InputStatistics | None:
    """One site's statistics, memory-mapped; None where calibration saw nothing enter it.

    Raises:
        OSError, SafetensorError: the file is not there or damaged.
    """
    with safe_open(path, framework="pt") as file:
        if site not in file.keys():  # noqa: SIM118
            return None
        tokens = int(file.get_tensor(f"{site}{COUNT}"))
        return InputStatistics(file.get_tensor(site), tokens)
