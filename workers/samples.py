"""Windows of one part of the data, and the fixed grid in which they are run."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from apportion.errors import InvalidInput
from apportion.spaces.batches import Batch

Part = Literal["calibration", "search", "heldout"]
PARTS: tuple[Part, ...] = get_args(Part)


@dataclass(frozen=True)
class Chunk:
    """What one forward pass takes: `windows` windows from the absolute place `first` on."""

    first: int
    windows: int
    batch: Batch


@dataclass(frozen=True)
class Samples:
    """The windows of one part of the data, in the order that slices count by.

    Attributes:
        batches: one window each (text), or the user's batches.
        documents: for each window the number of its document, or None where there are none.
        hash: of the content, order included.
        document_hashes: to see that parts are disjoint.
        note: a line for the user where there is less data than asked for, or None.
    """

    batches: Sequence[Batch]
    documents: tuple[int, ...] | None
    hash: str
    document_hashes: frozenset[str]
    note: str | None

    @property
    def windows(self) -> int:
        """Number of windows."""
        return sum(windows_in(batch) for batch in self.batches)

    def chunks(self, size: int) -> list[Chunk]:
        """The fixed grid of forward passes: text in chunks of `size` windows, else as given."""
        if self.documents is None:
            return list(_numbered(self.batches))
        parts = [self.batches[k : k + size] for k in range(0, len(self.batches), size)]
        return list(_numbered([joined(part) for part in parts]))


def windows_in(batch: Batch) -> int:
    """Windows of a batch: the length of its first tensor."""
    return len(first_tensor(batch))


def first_tensor(batch: Batch) -> Tensor:
    """A dict's first value, a tuple's first item, or the tensor itself."""
    if isinstance(batch, dict):
        return next(iter(batch.values()))
    return batch[0] if isinstance(batch, tuple) else batch


def joined(batches: Sequence[Batch]) -> Batch:
    """Dicts of like shape as one batch."""
    rows = [batch for batch in batches if isinstance(batch, dict)]
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


def named_tensors(batch: Batch) -> dict[str, Tensor]:
    """The tensors of a batch by key, or by place."""
    if isinstance(batch, dict):
        return batch
    items = batch if isinstance(batch, tuple) else (batch,)
    return {str(place): item for place, item in enumerate(items)}


def check_disjoint(samples: Mapping[Part, Samples]) -> None:
    """Raise InvalidInput where two parts share a document."""
    names = list(samples)
    for place, first in enumerate(names):
        for second in names[place + 1 :]:
            shared = samples[first].document_hashes & samples[second].document_hashes
            if shared:
                raise InvalidInput(
                    f"data: {first} and {second} share {len(shared)} documents; a loss on data "
                    "that the search saw proves nothing; give them different ones"
                )


def _numbered(batches: Sequence[Batch]) -> Iterator[Chunk]:
    first = 0
    for batch in batches:
        yield Chunk(first, windows_in(batch), batch)
        first += windows_in(batch)
