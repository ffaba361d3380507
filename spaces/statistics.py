"""Calibration's statistics on disk: written a tensor at a time, read a site at a time."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from apportion.files import write_whole
from apportion.hashing import tensors_hash
from apportion.spaces.added import Added
from apportion.spaces.compressors.compose import InputStatistics

COUNT = ":n"
GATES = ":gates"
PEAK = ":peak"
DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.int64: "I64"}


def write_statistics(path: Path, sites: Mapping[str, InputStatistics | Added]) -> None:
    """Write a safetensors file, whole or not at all, without a second copy of it in memory.

    A site's second moment, or the sum of what it adds, has the site's name, its number of tokens
    that name and ":n", the largest values of its inputs that name and ":peak".

    Raises:
        OSError: the disk is full or the folder cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    for name, found in sites.items():
        total = found.total if isinstance(found, Added) else found.second_moment
        tensors |= {name: total, f"{name}{COUNT}": torch.tensor(found.tokens)}
        if isinstance(found, InputStatistics) and found.peak is not None:
            tensors[f"{name}{PEAK}"] = found.peak
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
        names = set(file.keys())
        if site not in names:
            return None
        tokens = int(file.get_tensor(f"{site}{COUNT}"))
        peak = file.get_tensor(f"{site}{PEAK}") if f"{site}{PEAK}" in names else None
        return InputStatistics(file.get_tensor(site), tokens, peak)


def read_added(path: Path, site: str) -> Added:
    """What a structure site adds, memory-mapped. Raises like `read_statistics`."""
    with safe_open(path, framework="pt") as file:
        return Added(file.get_tensor(site), int(file.get_tensor(f"{site}{COUNT}")))


def write_gates(path: Path, scores: Mapping[str, Tensor]) -> None:
    """Write the scores of sites' gates, float64 [units], by the sites' names.

    Raises:
        OSError: the disk is full or the folder cannot be written.
    """
    write_whole(path, save({f"{name}{GATES}": found for name, found in scores.items()}))


class StatisticsFiles:
    """Input statistics of sites, each in a file of several; one site's are held at a time."""

    def __init__(self, files: Mapping[str, Path]) -> None:
        """Takes the file of each site, by its name; of the scores of its gates, with ":gates"."""
        self._files = files
        self._last: tuple[str, InputStatistics | None] | None = None

    def of(self, site: str) -> InputStatistics | None:
        """A site's statistics, the same object until another site's are asked for.

        Raises:
            OSError, SafetensorError: like `read_statistics`.
        """
        if self._last is None or self._last[0] != site:
            self._last = None
            self._last = (site, read_statistics(self._files[site], site))
        return self._last[1]

    def added(self, site: str) -> Added:
        """What a structure site adds. Raises like `of`."""
        return read_added(self._files[site], site)

    def gates(self, site: str) -> Tensor:
        """The scores of a structure site's gates, float64 [units]. Raises like `of`."""
        with safe_open(self._files[f"{site}{GATES}"], framework="pt") as file:
            scores: Tensor = file.get_tensor(f"{site}{GATES}")
        return scores

    def hash(self, site: str) -> str | None:
        """Content hash of a site's statistics; None where it has none. Raises like `of`."""
        found = self.of(site)
        if found is None:
            return None
        return tensors_hash({"m": found.second_moment, "n": torch.tensor(found.tokens)})

    def peak_hash(self, site: str) -> str | None:
        """Content hash of the largest values of a site's inputs; None: not known. Raises like `of`.

        Not in `hash`: what takes no range of the inputs does not change with it.
        """
        found = self.of(site)
        if found is None or found.peak is None:
            return None
        return tensors_hash({"peak": found.peak})
