"""Keys and values of one attention layer as packed integers.

As KIVI (Liu et al., ICML 2024, "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache"):
keys have a scale and a zero for each channel of a head and each 32 tokens in a row, because a few
channels are large at all tokens; values have them for each token and each 32 channels of a head.
The last tokens, fewer than 32, have keys in the model's dtype. KIVI also keeps the last 128 tokens
of both unrounded, and attends to unrounded ones in a prompt. Here a token attends to the rounded
keys of the groups before its own and to the unrounded ones of its own, and to rounded values,
however many tokens come at a time: a prompt gives what its tokens give one by one.

| tensors of | shape |
|---|---|
| keys | `codes` uint8 [batch, heads, groups, channels, 4 * bits]: 32 tokens each; `scale`, `zero` |
| | bfloat16 [batch, heads, groups, channels]; `rest` [batch, heads, < 32, channels] |
| values | `codes` uint8 [batch, heads, tokens, ceil(channels / 8) * bits]; `scale`, `zero` |
| | bfloat16 [batch, heads, tokens, groups] |

A code q stands for q * scale + zero. The zero is the least value of its group rounded down, and the
scale the rest of the range over 2^bits - 1 rounded up, so that no value lies outside of the codes:
each is at most half a scale away from what stands for it, before the model's dtype rounds that.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from apportion.errors import InvalidInput
from apportion.kernels.codes import levels
from apportion.kernels.packing import CODES_PER_WORD, pack_codes, packed_bytes, unpack_codes

GROUP = 32
SCALE_BYTES = 2 * torch.bfloat16.itemsize
"""A scale and a zero."""
TOKENS = 2
"""The dimension of tokens, or of groups of them, in every tensor."""


@dataclass(frozen=True)
class CacheFormat:
    """Bits of keys and of values, each one of `codes.CACHE_BITS`."""

    key_bits: int
    value_bits: int

    def bytes_per_token(self, heads: int, key_channels: int, value_channels: int) -> float:
        """Of one token of one sequence, codes, scales and zeros; a key's share of its group."""
        key = packed_bytes(GROUP, self.key_bits) + SCALE_BYTES
        value = packed_bytes(_in_words(value_channels), self.value_bits)
        value += SCALE_BYTES * (value_channels // value_group(value_channels))
        return heads * (key_channels * key / GROUP + value)


def value_group(channels: int) -> int:
    """Channels of a value that share a scale: 32, or the whole head where 32 do not divide it."""
    return GROUP if channels % GROUP == 0 else channels


@dataclass(frozen=True)
class Codes:
    """Packed groups: what is stored of a tensor [batch, heads, tokens or groups of them, ...]."""

    codes: Tensor
    scale: Tensor
    zero: Tensor

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """All of it."""
        return self.codes, self.scale, self.zero

    def then(self, more: "Codes") -> "Codes":
        """These and more of them."""
        pairs = zip(self.tensors, more.tensors, strict=True)
        return Codes(*(torch.cat(pair, TOKENS) for pair in pairs))

    def part(self, start: int, stop: int) -> "Codes":
        """Those of some tokens, or groups of them."""
        return Codes(*(tensor[:, :, start:stop] for tensor in self.tensors))

    def select(self, sequences: Tensor) -> "Codes":
        """Those of some sequences of the batch."""
        return Codes(*(tensor.index_select(0, sequences) for tensor in self.tensors))


class PackedCache:
    """Grows by keys and values, and gives all that it holds unpacked again.

    The codes of a group depend on its tokens alone, not on how many came at a time.
    """

    def __init__(self, format: CacheFormat, keys: Tensor, values: Tensor) -> None:
        """An empty one for keys and values like these, `[batch, heads, tokens, channels]`."""
        self.format = format
        self.dtype = keys.dtype
        self.channels = keys.shape[-1], values.shape[-1]
        self.rest = keys[:, :, :0]
        self.keys = _pack_keys(self.rest, format.key_bits)
        self.values = _pack_values(values[:, :, :0], format.value_bits)

    @property
    def tokens(self) -> int:
        """How many it holds of each sequence."""
        return self.values.codes.shape[TOKENS]

    @property
    def packed_bytes(self) -> int:
        """Bytes of codes, scales and zeros; `rest` is beside them."""
        return sum(tensor.nbytes for tensor in (*self.keys.tensors, *self.values.tensors))

    def update(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add tokens `[batch, heads, tokens, channels]`; gives what they attend to.

        One token: all keys and values. More of them: the same as stored, and then once more the
        tokens from their first group on, with unrounded keys; `attended` says who sees which.
        """
        before, groups = self.keys, self.keys.codes.shape[TOKENS]
        raw = torch.cat([self.rest, keys], TOKENS)
        self._add(keys, values)
        stored_keys, stored_values = self.unpacked()
        if keys.shape[TOKENS] == 1:
            old = _unpack_keys(before, self.format.key_bits, self.dtype)
            return torch.cat([old, raw], TOKENS), stored_values
        again = stored_values[:, :, groups * GROUP :]
        return torch.cat([stored_keys, raw], TOKENS), torch.cat([stored_values, again], TOKENS)

    def _add(self, keys: Tensor, values: Tensor) -> None:
        self.rest = torch.cat([self.rest, keys], TOKENS)
        whole = self.rest.shape[TOKENS] // GROUP * GROUP
        if whole:
            packed = _pack_keys(self.rest[:, :, :whole], self.format.key_bits)
            self.keys = self.keys.then(packed)
            self.rest = self.rest[:, :, whole:].clone()
        self.values = self.values.then(_pack_values(values, self.format.value_bits))

    def unpacked(self) -> tuple[Tensor, Tensor]:
        """All keys and all values, `[batch, heads, tokens, channels]`, in the model's dtype."""
        keys = _unpack_keys(self.keys, self.format.key_bits, self.dtype)
        values = _unpack_values(self.values, self.format.value_bits, self.channels[1], self.dtype)
        return torch.cat([keys, self.rest], TOKENS), values

    def crop(self, tokens: int) -> None:
        """Keep the first tokens; keys of a group that is cut stay as its codes gave them."""
        groups, rest = divmod(tokens, GROUP)
        if groups < self.keys.codes.shape[TOKENS]:
            cut = self.keys.part(groups, groups + 1)
            self.rest = _unpack_keys(cut, self.format.key_bits, self.dtype)
        self.keys = self.keys.part(0, groups)
        self.rest = self.rest[:, :, :rest]
        self.values = self.values.part(0, tokens)

    def select(self, sequences: Tensor) -> None:
        """Go on with these sequences of the batch, in this order; one may be there repeatedly."""
        sequences = sequences.to(self.rest.device)
        self.rest = self.rest.index_select(0, sequences)
        self.keys, self.values = self.keys.select(sequences), self.values.select(sequences)


def attended(mask: Tensor | None, past: int, tokens: int) -> Tensor:
    """Which of what `PackedCache.update` gives for several tokens each of them attends to.

    Args:
        mask: what they attend to in a dense cache, `[batch or 1, 1, tokens, all or more]`, True or
            0 where they do, False or a large negative number where not; None: to all before.
        past: tokens that were there before.
        tokens: that come, more than one.

    Returns:
        A mask of the same kind over what is given, `[batch or 1, 1, tokens, given]`.

    Raises:
        InvalidInput: a mask of another shape.
    """
    total, first = past + tokens, past // GROUP * GROUP
    device = None if mask is None else mask.device
    query = torch.arange(past, total, device=device)[:, None]
    key = torch.arange(total, device=device)
    stored = key // GROUP < query // GROUP
    own = (key // GROUP == query // GROUP) & (key <= query)
    seen = torch.cat([stored, own[:, first:]], 1)[None, None]
    if mask is None:
        return seen
    if mask.ndim != 4 or mask.shape[2] != tokens or mask.shape[3] < total:
        raise InvalidInput(f"attention has a mask {list(mask.shape)}, not [batch, 1, tokens, all]")
    given = torch.cat([mask[..., :total], mask[..., first:total]], -1)
    if given.dtype == torch.bool:
        return given & seen
    return given.masked_fill(~seen, torch.finfo(given.dtype).min)


def _pack_keys(keys: Tensor, bits: int) -> Codes:
    """Whole groups of keys `[batch, heads, groups * 32, channels]`."""
    batch, heads, tokens, channels = keys.shape
    groups = keys.reshape(batch, heads, tokens // GROUP, GROUP, channels)
    codes, scale, zero = _encoded(groups.transpose(-1, -2), bits)
    return Codes(_packed(codes, bits), scale, zero)


def _unpack_keys(packed: Codes, bits: int, dtype: torch.dtype) -> Tensor:
    codes = _unpacked(packed.codes, bits)
    return _decoded(codes, packed.scale, packed.zero, dtype).transpose(-1, -2).flatten(2, 3)


def _pack_values(values: Tensor, bits: int) -> Codes:
    """Values `[batch, heads, tokens, channels]`, each token by itself."""
    codes, scale, zero = _encoded(_in_groups(values), bits)
    return Codes(_packed(codes.flatten(-2), bits), scale, zero)


def _unpack_values(packed: Codes, bits: int, channels: int, dtype: torch.dtype) -> Tensor:
    codes = _in_groups(_unpacked(packed.codes, bits)[..., :channels])
    return _decoded(codes, packed.scale, packed.zero, dtype).flatten(-2)


def _in_groups(values: Tensor) -> Tensor:
    """Values `[..., channels]` as `[..., groups, channels of a group]`."""
    channels = values.shape[-1]
    size = value_group(channels)
    return values.reshape(*values.shape[:-1], channels // size, size)


def _encoded(groups: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Groups `[..., members]` as codes uint8 of that shape, and scale and zero `[...]`."""
    groups = groups.float()
    zero = _rounded_down(groups.amin(-1))
    span = groups.amax(-1) - zero.float()
    scale = -_rounded_down(-span / (levels(bits) - 1))
    step = torch.where(scale > 0, scale.float(), 1.0)  # all members are the zero
    steps = (groups - zero.float()[..., None]) / step[..., None]
    return steps.round().clamp(0, levels(bits) - 1).to(torch.uint8), scale, zero


def _decoded(codes: Tensor, scale: Tensor, zero: Tensor, dtype: torch.dtype) -> Tensor:
    return (codes.float() * scale.float()[..., None] + zero.float()[..., None]).to(dtype)


def _rounded_down(x: Tensor) -> Tensor:
    """The largest bfloat16 number that is not above each of float32 ones."""
    near = x.to(torch.bfloat16)
    below = torch.nextafter(near, torch.full_like(near, -torch.inf))
    return torch.where(near.float() > x, below, near)


def _packed(codes: Tensor, bits: int) -> Tensor:
    """Codes `[..., n]` as bytes `[..., ceil(n / 8) * bits]`: each row ends with a whole byte."""
    rows = pad(codes, (0, _in_words(codes.shape[-1]) - codes.shape[-1]))
    size = packed_bytes(rows.shape[-1], bits)
    return pack_codes(rows.flatten(), bits).view(*rows.shape[:-1], size)


def _unpacked(packed: Tensor, bits: int) -> Tensor:
    """Inverse of `_packed`, with the codes that filled it up."""
    codes = packed.shape[-1] * 8 // bits
    found = unpack_codes(packed.flatten(), bits, packed.numel() * 8 // bits)
    return found.view(*packed.shape[:-1], codes)


def _in_words(codes: int) -> int:
    """So many codes, filled up to a whole number of those that are whole bytes at any bits."""
    return -(-codes // CODES_PER_WORD) * CODES_PER_WORD
