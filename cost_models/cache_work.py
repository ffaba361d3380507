"""The work that a key-value cache is, beside the attention that reads it: timed by itself."""

from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import torch

from apportion.cost_models.harness import Call
from apportion.cost_models.operators import Given
from apportion.cost_models.requests import RequestItem
from apportion.hashing import content_hash
from apportion.kernels.formats import DTYPES
from apportion.kernels.packed_cache import CacheFormat, PackedCache
from apportion.spaces.caches import attention_of
from apportion.spaces.sites import Cached
from apportion.spaces.space import Space


@dataclass(frozen=True)
class CacheWork:
    """Tokens that come to a cache of one layer, and all that it gives back.

    Attributes:
        format: how they are packed; None: they stay as they are.
        cached: heads and channels.
        batch: sequences.
        context: tokens that are there before.
        tokens: that come.
        dtype: of the model.
    """

    format: CacheFormat | None
    cached: Cached
    batch: int
    context: int
    tokens: int
    dtype: str

    @property
    def description(self) -> dict[str, Any]:
        """All of it as JSON; layers alike are one work."""
        shape = [self.cached.heads, self.cached.key_channels, self.cached.value_channels]
        bits = None if self.format is None else list(asdict(self.format).values())
        return {"bits": bits, "shape": shape, "tokens": [self.batch, self.context, self.tokens],
                "dtype": self.dtype}  # fmt: skip

    @cached_property
    def key(self) -> str:
        """Content hash of the description."""
        return content_hash(self.description)

    @property
    def unpacked(self) -> "CacheWork | None":
        """What the dense model does in its place; None: nothing, where no token was there."""
        return replace(self, format=None) if self.context else None

    def call(self) -> Call:
        """Add the tokens, and forget them again. To be called without gradients.

        It returns the keys and values that attention is given.
        """
        keys, values = self._random(self.context)
        new_keys, new_values = self._random(self.tokens)
        if self.format is None:
            return lambda: (torch.cat([keys, new_keys], 2), torch.cat([values, new_values], 2))
        packed, context = PackedCache(self.format, keys, values), self.context
        packed.update(keys, values)

        def once() -> tuple[torch.Tensor, torch.Tensor]:
            attended = packed.update(new_keys, new_values)
            packed.crop(context)
            return attended

        return once

    def _random(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        dtype, cached = DTYPES[self.dtype], self.cached
        size = (self.batch, cached.heads, tokens)
        return (
            torch.randn(*size, cached.key_channels, dtype=dtype),
            torch.randn(*size, cached.value_channels, dtype=dtype),
        )


def cache_works(
    space: Space, item: RequestItem, given: dict[str, Given]
) -> dict[tuple[int, int], CacheWork]:
    """(cache, option) -> its work in one request item, as far as its attention is reached.

    Args:
        space: sites and options.
        item: the work of the whole model.
        given: path of an attention sub-block -> what it is given, `[batch, tokens, features]`.
    """
    works: dict[tuple[int, int], CacheWork] = {}
    for place, site in enumerate(space.sites):
        seen = given.get(attention_of(site))
        if site.cache is None or seen is None:
            continue
        for number, option in enumerate(space.options[place]):
            if option.cache_bits:
                batch, tokens = seen.shape[:2]
                form = CacheFormat(*option.cache_bits)
                context = item.context or 0
                works[place, number] = CacheWork(
                    form, site.cache, batch, context, tokens, seen.dtype
                )
    return works
