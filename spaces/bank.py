"""The bank: every realized option, made once, named by what it was made from."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from apportion.errors import ApportionError
from apportion.files import write_whole
from apportion.hashing import content_hash, file_hash, tensors_hash
from apportion.kernels.formats import Format, LayerShape, StoredWeight
from apportion.spaces.grammar import Option
from apportion.spaces.stored import StoredSite

# Part of every entry's name: raise it when a compressor gives other numbers than before
# (tests/spaces/test_bank.py holds a golden entry that notices).
COMPRESSOR_VERSION = 3
HASH, CONSTANT, BIASES, NORM = "tensors", "constant", "biases", "norm"


class NotFetched(ApportionError):
    """An entry does not come here: the machines' fault, and not what the entry is for."""


def entry_key(
    weights_hash: str,
    option: Option,
    statistics_hash: str | None,
    model_dtype: str,
    rank_multiple: int,
) -> str:
    """The content-addressed name of a site's weights under an option."""
    made_from = [weights_hash, str(option), statistics_hash, model_dtype, rank_multiple]
    return content_hash([COMPRESSOR_VERSION, *made_from])


class Bank:
    """A folder of realized options, one safetensors file each: whole entries only.

    An entry holds the packed tensors of all members of a site, named `MEMBER.TENSOR`, and in its
    header the members' formats and shapes, and the hash of their tensors, which every read checks.
    (Entries that were written before there was one are read as they are.) Of a treatment the header
    is {"members": those, "kept": numbers of the units that stay}, and where biases are stored too,
    as tensors `biases.MEMBER`, "biases": their hash; of a constant, whose tensor is named so,
    {"members": [], "constant": its hash}; of scales in a norm, whose vectors are tensors
    `norm.NUMBER`, {"members": those, "norm": the vectors' hash}.
    """

    def __init__(
        self, folder: Path, fetch: Callable[[str], tuple[bytes, str]] | None = None
    ) -> None:
        """Takes the folder.

        Args:
            folder: need not be there yet.
            fetch: gives the bytes of an entry that is not there and their hash, or raises
                NotFetched.
        """
        self.folder = folder
        self._fetch = fetch

    def path(self, key: str) -> Path:
        """The file of an entry, there or not."""
        return self.folder / key[:2] / f"{key}.safetensors"

    def has(self, key: str) -> bool:
        """Whether the entry is there."""
        return self.path(key).is_file()

    def bytes(self, key: str) -> int:
        """Size of an entry's file; 0 if it is not there."""
        path = self.path(key)
        return path.stat().st_size if path.is_file() else 0

    def put(self, key: str, stored: StoredSite) -> None:
        """Write an entry: it appears whole or not at all.

        Raises:
            OSError: the disk is full or the folder cannot be written.
        """
        tensors = {
            f"{place}.{name}": tensor.contiguous()
            for place, member in enumerate(stored.weights)
            for name, tensor in member.tensors.items()
        }
        header = [
            {
                "format": m.format.to_json(),
                "shape": m.shape.to_json(),
                HASH: tensors_hash(m.tensors),
            }
            for m in stored.weights
        ]
        more: dict[str, Any] = {} if stored.kept is None else {"kept": stored.kept}
        if stored.constant is not None:
            tensors[CONSTANT] = stored.constant.contiguous()
            more[CONSTANT] = tensors_hash({CONSTANT: stored.constant})
        biases = {f"{n}": b.contiguous() for n, b in enumerate(stored.biases) if b is not None}
        if stored.biases:
            tensors |= {f"{BIASES}.{place}": bias for place, bias in biases.items()}
            more[BIASES] = tensors_hash(biases)
        norm = {f"{number}": vector.contiguous() for number, vector in enumerate(stored.norm)}
        if norm:
            tensors |= {f"{NORM}.{number}": vector for number, vector in norm.items()}
            more[NORM] = tensors_hash(norm)
        # one key: safetensors writes several in any order, and equal entries are equal files
        told = {"members": header, **more} if more else header
        content = save(tensors, metadata={"members": json.dumps(told)})
        write_whole(self.path(key), content)

    def ensure(self, key: str) -> None:
        """Have an entry here, fetched if need be. Raises NotFetched."""
        if self._fetch is None or self.has(key):
            return
        path, (content, expected) = self.path(key), self._fetch(key)
        try:
            write_whole(path, content)
            if file_hash(path) != expected:
                path.unlink(missing_ok=True)
                raise NotFetched(f"bank entry {path} is not what was sent: the disk is faulty")
        except OSError as error:
            raise NotFetched(f"bank entry {path} cannot be written: {error}") from error

    def get(self, key: str) -> StoredSite:
        """Read an entry, memory-mapped; fetch it before where that is needed and possible.

        Raises:
            NotFetched: the entry is not here, and does not come.
            ApportionError: it is missing or damaged.
        """
        path = self.path(key)
        self.ensure(key)
        try:
            with safe_open(path, framework="pt") as file:
                told = json.loads(file.metadata()["members"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            more = told if isinstance(told, dict) else {"members": told}
            header, kept = more["members"], more.get("kept")
            weights = [_member(place, header[place], tensors) for place in range(len(header))]
            constant = _constant(more[CONSTANT], tensors) if CONSTANT in more else None
            biases = _biases(len(header), more[BIASES], tensors) if BIASES in more else ()
            norm = tuple(_named(NORM, more[NORM], tensors).values()) if NORM in more else ()
            kept = kept and tuple(map(int, kept))
            return StoredSite(tuple(weights), kept, constant, biases, norm)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ApportionError(f"bank entry {path} cannot be read: {error}") from error


def _member(place: int, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> StoredWeight:
    prefix = f"{place}."
    own = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    if header.get(HASH) not in (None, tensors_hash(own)):
        raise ValueError("its numbers are not those that were written: the disk is faulty")
    return StoredWeight(
        Format.from_json(header["format"]), LayerShape.from_json(header["shape"]), own
    )


def _biases(count: int, expected: str, tensors: Mapping[str, Tensor]) -> tuple[Tensor | None, ...]:
    own = _named(BIASES, expected, tensors)
    return tuple(own.get(f"{place}") for place in range(count))


def _named(group: str, expected: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors `GROUP.NUMBER` by their numbers in ascending order."""
    prefix = f"{group}."
    own = {n.removeprefix(prefix): t for n, t in sorted(tensors.items()) if n.startswith(prefix)}
    if tensors_hash(own) != expected:
        raise ValueError("its numbers are not those that were written: the disk is faulty")
    return own


def _constant(expected: str, tensors: Mapping[str, Tensor]) -> Tensor:
    constant = tensors[CONSTANT]
    if tensors_hash({CONSTANT: constant}) != expected:
        raise ValueError("its numbers are not those that were written: the disk is faulty")
    return constant
