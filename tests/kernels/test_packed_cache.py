"""Packed keys and values against their definition in float64, and how they grow and shrink."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, StaticCache
from transformers.models.llama import LlamaConfig

from apportion.errors import InvalidInput
from apportion.kernels.cache_layer import PackedLayer, pack_layer
from apportion.kernels.codes import CACHE_BITS
from apportion.kernels.packed_cache import GROUP, CacheFormat, PackedCache, value_group

SHAPES = st.tuples(
    st.integers(1, 2),
    st.integers(1, 3),
    st.integers(1, 70),
    st.sampled_from([4, 6, 32, 40, 64]),
    st.sampled_from([4, 6, 32, 40, 64]),
)
FORMATS = st.builds(CacheFormat, st.sampled_from(CACHE_BITS), st.sampled_from(CACHE_BITS))


def drawn(shape, seed, dtype=torch.float32):
    """Keys and values; keys have channels that are large at all tokens."""
    draw = torch.Generator().manual_seed(seed)
    batch, heads, tokens, key_channels, value_channels = shape
    keys = torch.randn(batch, heads, tokens, key_channels, generator=draw)
    keys += 20 * torch.randn(key_channels, generator=draw)
    values = torch.randn(batch, heads, tokens, value_channels, generator=draw)
    return keys.to(dtype), values.to(dtype)


def filled(format, keys, values, steps=None):
    """A cache that took the tokens in steps of these lengths; None: at once."""
    cache = PackedCache(format, keys, values)
    for some_keys, some_values in zip(
        keys.split(steps or keys.shape[2], 2), values.split(steps or keys.shape[2], 2), strict=True
    ):
        cache.update(some_keys, some_values)
    return cache


def expected(members, bits):
    """What one group stands for, by definition: exact but for the last rounding to float64."""
    low, high = (Fraction(float(end)) for end in (members.min(), members.max()))
    zero = in_bfloat16(low, down=True)
    scale = in_bfloat16((high - zero) / (2**bits - 1), down=False)
    if not scale:
        return [float(zero)] * len(members), 0.0
    codes = [round((Fraction(float(x)) - zero) / scale) for x in members]
    assert 0 <= min(codes) and max(codes) < 2**bits
    return [float(code * scale + zero) for code in codes], float(scale)


def in_bfloat16(value: Fraction, down: bool) -> Fraction:
    """The nearest bfloat16 number below or above; subnormal ones are not drawn."""
    near = torch.tensor(float(value), dtype=torch.float64).to(torch.bfloat16)
    for _ in range(3):
        found = Fraction(float(near))
        if found == value or (found < value) == down:
            return found
        near = torch.nextafter(near, torch.full_like(near, -torch.inf if down else torch.inf))
    raise AssertionError("no bfloat16 number")


def groups_of(keys, values):
    """Every group as (its place in the tensor, 0 for keys and 1 for values)."""
    batch, heads, tokens, _ = keys.shape
    size = value_group(values.shape[-1])
    for b in range(batch):
        for h in range(heads):
            for first in range(0, tokens // GROUP * GROUP, GROUP):
                for channel in range(keys.shape[-1]):
                    yield 0, (b, h, slice(first, first + GROUP), channel)
            for token in range(tokens):
                for first in range(0, values.shape[-1], size):
                    yield 1, (b, h, token, slice(first, first + size))


@settings(max_examples=15, deadline=None)
@given(SHAPES, FORMATS, st.integers(0, 2**16))
def test_unpacked_is_what_the_definition_says(shape, format, seed):
    keys, values = drawn(shape, seed)
    given_back = filled(format, keys, values).unpacked()
    places = list(groups_of(keys, values))
    draw = torch.Generator().manual_seed(seed)
    for number in torch.randperm(len(places), generator=draw)[:20].tolist():
        which, place = places[number]
        members = (keys, values)[which][place]
        bits = (format.key_bits, format.value_bits)[which]
        wanted, scale = expected(members, bits)
        error = (given_back[which][place].double() - torch.tensor(wanted)).abs()
        # Float32 may decide ties otherwise: then both codes are as near.
        tie = (members.double() - given_back[which][place]).abs() < scale * 0.5001
        assert ((error <= 1e-5 * members.abs().max()) | ((error < 1.01 * scale) & tie)).all()
        assert ((members - given_back[which][place]).abs() <= 0.5001 * scale + 1e-5 * 80).all()


@settings(max_examples=15, deadline=None)
@given(SHAPES, FORMATS, st.data())
def test_tokens_one_by_one_or_in_chunks_give_the_same_codes(shape, format, data):
    keys, values = drawn(shape, 1)
    whole = filled(format, keys, values)
    parted = filled(format, keys, values, data.draw(st.integers(1, shape[2])))
    for one, other in zip(whole.keys.tensors, parted.keys.tensors, strict=True):
        assert torch.equal(one, other)
    for one, other in zip(whole.values.tensors, parted.values.tensors, strict=True):
        assert torch.equal(one, other)
    assert torch.equal(whole.rest, parted.rest)
    assert torch.equal(whole.rest, keys[:, :, shape[2] // GROUP * GROUP :])


@settings(max_examples=25, deadline=None)
@given(SHAPES, FORMATS)
def test_bytes_are_those_of_its_tensors(shape, format):
    batch, heads, tokens, *channels = shape
    tokens = -(-tokens // GROUP) * GROUP  # no rest
    keys, values = drawn((batch, heads, tokens, *channels), 2)
    each = format.bytes_per_token(heads, *channels)
    assert filled(format, keys, values).packed_bytes == batch * tokens * each


@pytest.mark.parametrize(
    ("format", "bytes_per_token"),
    [
        (CacheFormat(4, 4), 64 * 5 / 8 * 2),  # 4 bits, and 32 for each 32
        (CacheFormat(2, 2), 64 * 3 / 8 * 2),
        (CacheFormat(8, 2), 64 * 9 / 8 + 64 * 3 / 8),
    ],
)
def test_a_scale_and_a_zero_are_a_bit_of_each_number(format, bytes_per_token):
    assert format.bytes_per_token(1, 64, 64) == bytes_per_token


@settings(max_examples=25, deadline=None)
@given(SHAPES, FORMATS, st.data())
def test_cropped_holds_the_first_tokens(shape, format, data):
    keys, values = drawn(shape, 3)
    cache = filled(format, keys, values)
    before = cache.unpacked()
    left = data.draw(st.integers(0, shape[2]))
    cache.crop(left)
    assert cache.tokens == left
    for one, other in zip(cache.unpacked(), before, strict=True):
        assert torch.equal(one, other[:, :, :left])
    assert cache.rest.shape[2] == left % GROUP


def test_sequences_are_chosen_with_all_that_they_hold():
    keys, values = drawn((3, 2, 40, 8, 8), 4)
    cache = filled(CacheFormat(4, 2), keys, values)
    before = cache.unpacked()
    cache.select(torch.tensor([2, 0, 0, 1]))
    for one, other in zip(cache.unpacked(), before, strict=True):
        assert torch.equal(one, other[[2, 0, 0, 1]])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtype_is_that_of_the_model(dtype):
    keys, values = drawn((1, 2, 40, 8, 8), 5, dtype)
    found = filled(CacheFormat(8, 8), keys, values).unpacked()
    assert [each.dtype for each in found] == [dtype, dtype]


def test_a_group_of_equal_numbers_loses_what_bfloat16_loses():
    keys = torch.full((1, 1, 32, 4), 0.3)
    cache = filled(CacheFormat(2, 2), keys, torch.zeros(1, 1, 32, 4))
    found, zeros = cache.unpacked()
    assert (found - keys).abs().max() < 0.3 / 128 and not zeros.any()


def test_numbers_that_are_not_finite_stay_so():
    keys, values = drawn((1, 1, 40, 4, 4), 6)
    values[0, 0, 3, 2] = torch.nan
    assert not filled(CacheFormat(4, 4), keys, values).unpacked()[1][0, 0, 3].isfinite().any()


def test_layer_of_a_dynamic_cache_is_replaced_once():
    cache = DynamicCache()
    pack_layer(cache, 2, CacheFormat(4, 4))
    packed = cache.layers[2]
    assert isinstance(packed, PackedLayer) and len(cache.layers) == 3
    keys, values = drawn((2, 1, 40, 8, 8), 7)
    cache.update(keys, values, 2)
    pack_layer(cache, 2, CacheFormat(4, 4))
    assert cache.layers[2] is packed
    assert (cache.get_seq_length(2), cache.get_mask_sizes(3, 2)) == (40, (43, 0))
    packed.crop(-9)
    packed.reorder_cache(torch.tensor([1, 0]))
    packed.batch_repeat_interleave(2)
    wanted = filled(CacheFormat(4, 4), keys, values).unpacked()[0][[1, 1, 0, 0], :, :31]
    assert torch.equal(packed.keys, wanted)
    packed.reset()
    assert packed.get_seq_length() == 0 and packed.keys is None


@pytest.mark.parametrize(
    ("cache", "message"),
    [
        (StaticCache(LlamaConfig(num_hidden_layers=2), 16), "use a DynamicCache"),
        (DynamicCache(config=LlamaConfig(sliding_window=8)), "DynamicSlidingWindowLayer"),
    ],
)
def test_other_caches_are_refused(cache, message):
    with pytest.raises(InvalidInput, match=message):
        pack_layer(cache, 0, CacheFormat(4, 4))


def test_a_cache_that_another_model_filled_is_refused():
    cache = DynamicCache()
    cache.update(*drawn((1, 1, 5, 8, 8), 8), 0)
    with pytest.raises(InvalidInput, match="holds 5 tokens"):
        pack_layer(cache, 0, CacheFormat(4, 4))
