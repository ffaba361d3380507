"""What is packed comes back to the bit."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from apportion.errors import ApportionError
from apportion.studies.database.packing import (
    pack_floats,
    pack_indices,
    unpack_floats,
    unpack_indices,
)

HEADER_BYTES = 1
SPECIAL = [math.nan, -math.nan, math.inf, -math.inf, -0.0, 0.0, 5e-324, 2.2e-308, 1.7e308, 0.1]
FLOATS = st.floats() | st.floats(width=32) | st.sampled_from(SPECIAL)


@given(st.lists(FLOATS, max_size=40))
def test_floats_to_the_bit(values: list[float]) -> None:
    array = np.array(values, np.float64)
    assert unpack_floats(pack_floats(array)).tobytes() == array.tobytes()


@given(st.integers(0, 2**64 - 1))
def test_every_pattern_of_bits(bits: int) -> None:
    """Also the payloads of nan, which arithmetic and casts may change."""
    array = np.array([bits, 0], np.uint64).view(np.float64)
    assert unpack_floats(pack_floats(array)).tobytes() == array.tobytes()


@given(st.lists(st.floats(width=32), min_size=1, max_size=40))
def test_four_bytes_where_float32_holds_them(values: list[float]) -> None:
    array = np.array(values, np.float64)
    assert len(pack_floats(array)) <= HEADER_BYTES + 4 * len(values)


@given(st.floats(), st.integers(100, 2000))
def test_constant_is_small(value: float, count: int) -> None:
    assert len(pack_floats(np.full(count, value))) < HEADER_BYTES + count


@given(st.lists(FLOATS, max_size=40))
def test_never_more_than_eight_bytes(values: list[float]) -> None:
    assert len(pack_floats(np.array(values, np.float64))) <= HEADER_BYTES + 8 * len(values)


def test_floats_of_a_view() -> None:
    array = np.arange(10, dtype=np.float64)[::-3]
    assert unpack_floats(pack_floats(array)).tolist() == [9.0, 6.0, 3.0, 0.0]


def test_unpacked_floats_may_be_written() -> None:
    values = unpack_floats(pack_floats(np.ones(2)))
    values += 1
    assert values.tolist() == [2.0, 2.0]


@given(st.lists(st.integers(0, 65_535), max_size=40))
def test_indices(values: list[int]) -> None:
    assert unpack_indices(pack_indices(values)) == values


@given(st.lists(st.integers(0, 255), max_size=40))
def test_small_indices_take_a_byte(values: list[int]) -> None:
    assert len(pack_indices(values)) == HEADER_BYTES + len(values)


@pytest.mark.parametrize("value", [-1, 65_536])
def test_index_out_of_range(value: int) -> None:
    with pytest.raises(OverflowError):
        pack_indices([value])


@pytest.mark.parametrize("packed", [b"", b"\x09\x00\x00\x00\x00"])
@pytest.mark.parametrize("unpack", [unpack_floats, unpack_indices])
def test_unknown_format(unpack: object, packed: bytes) -> None:
    assert callable(unpack)
    with pytest.raises(ApportionError, match="the database holds"):
        unpack(packed)


def test_formats_are_not_each_others() -> None:
    with pytest.raises(ApportionError, match="format"):
        unpack_indices(pack_floats(np.ones(1)))
    with pytest.raises(ApportionError, match="format"):
        unpack_floats(pack_indices([1]))
