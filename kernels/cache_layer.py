"""Packed keys and values behind the interface of transformers' caches, which it needs."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicCache, DynamicLayer

from apportion.errors import InvalidInput
from apportion.kernels.packed_cache import CacheFormat, PackedCache


class PackedLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer of a `DynamicCache` that holds packed codes.

    `keys` and `values` unpack all that it holds whenever they are read.
    """

    is_compileable = False
    is_croppable = True
    is_sliding = False
    supports_early_init = False

    def __init__(self, format: CacheFormat) -> None:
        # Not the base's: it sets keys and values, which are read here.
        self.format = format
        self.packed: PackedCache | None = None

    @property
    def is_initialized(self) -> bool:
        """Whether it holds anything."""
        return self.packed is not None

    @property
    def keys(self) -> Tensor | None:
        """`[batch, heads, tokens, channels]`, or None before there are any."""
        return None if self.packed is None else self.packed.unpacked()[0]

    @property
    def values(self) -> Tensor | None:
        """As `keys`."""
        return None if self.packed is None else self.packed.unpacked()[1]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Begin to hold keys and values like these."""
        self.packed = PackedCache(self.format, key_states, value_states)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **keywords: Any
    ) -> tuple[Tensor, Tensor]:
        """Add tokens `[batch, heads, tokens, channels]`; gives what they attend to."""
        if self.packed is None:
            self.packed = PackedCache(self.format, key_states, value_states)
        return self.packed.update(key_states, value_states)

    def get_seq_length(self) -> int:
        """Tokens of each sequence."""
        return 0 if self.packed is None else self.packed.tokens

    def get_max_length(self) -> int:
        """-1: it grows as far as memory reaches."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Tokens that so many more will attend to, and which is the first of them."""
        return self.get_seq_length() + query_length, 0

    def reset(self) -> None:
        """Forget all tokens."""
        self.packed = None

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens; their number is negative, as transformers has it.

        Raises:
            InvalidInput: it is positive.
        """
        if tokens_to_remove > 0:
            raise InvalidInput(
                f"a cache is cropped by a negative number of tokens, not {tokens_to_remove}"
            )
        if self.packed is not None:
            self.packed.crop(max(0, self.packed.tokens + tokens_to_remove))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Go on with these sequences, in this order (beam search)."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Go on with these sequences alone."""
        if self.packed is not None:
            self.packed.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each sequence so many times in a row."""
        if self.packed is not None:
            sequences = torch.arange(len(self.packed.rest))
            self.packed.select(sequences.repeat_interleave(repeats))


def pack_layer(cache: Any, index: int, format: CacheFormat) -> None:
    """Have a cache hold the layer `index` packed from its first token on.

    Raises:
        InvalidInput: it is no `DynamicCache` that keeps all tokens where they are, or it holds
            tokens of the layer that are not packed so.
    """
    if type(cache) is not DynamicCache:
        raise InvalidInput(
            f"a {type(cache).__name__} cannot hold packed keys and values; use a DynamicCache, "
            "which transformers takes where none is asked for"
        )
    if cache.offloading:
        raise InvalidInput("a cache that is offloaded cannot hold packed keys and values")
    while cache.layer_class_to_replicate is not None and len(cache.layers) <= index:
        cache.layers.append(cache.layer_class_to_replicate())
    layer = cache.layers[index]
    if isinstance(layer, PackedLayer) and layer.format == format:
        return
    if reason := unpackable(layer):
        raise InvalidInput(f"layer {index} of the cache cannot be packed: {reason}")
    if layer.get_seq_length():
        raise InvalidInput(
            f"layer {index} of the cache holds {layer.get_seq_length()} tokens that another model "
            "put there; begin with an empty one"
        )
    cache.layers[index] = PackedLayer(format)


def unpackable(layer: Any) -> str | None:
    """Why a layer of a cache cannot be packed; None: it can."""
    if type(layer) in (DynamicLayer, PackedLayer):
        return None
    return f"transformers keeps its tokens in a {type(layer).__name__}, not in a DynamicLayer"
