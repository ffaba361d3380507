import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from apportion.errors import ApportionError, InvalidInput
from apportion.kernels.codes import CODE_BITS, TERNARY_BITS, levels, middle
from apportion.kernels.packing import (
    pack_codes,
    pack_mask,
    packed_bytes,
    unpack_codes,
    unpack_mask,
)

BITS = st.sampled_from(CODE_BITS)


@st.composite
def coded(draw: st.DrawFn) -> tuple[float, list[int]]:
    bits = draw(BITS)
    return bits, draw(st.lists(st.integers(0, levels(bits) - 1), max_size=70))


@given(coded())
def test_codes_come_back_from_exactly_their_bytes(case: tuple[float, list[int]]) -> None:
    bits, values = case
    stored_bits = Fraction(8, 5) if bits == TERNARY_BITS else Fraction(bits)
    codes = torch.tensor(values, dtype=torch.uint8)
    packed = pack_codes(codes, bits)
    assert packed.dtype == torch.uint8 and len(packed) == math.ceil(len(values) * stored_bits / 8)
    assert unpack_codes(packed, bits, len(values)).tolist() == values


@given(coded())
def test_stream_is_little_endian(case: tuple[float, list[int]]) -> None:
    bits, values = case
    packed = bytes(pack_codes(torch.tensor(values, dtype=torch.uint8), bits).tolist())
    if bits == TERNARY_BITS:
        fives = (values[start : start + 5] for start in range(0, len(values), 5))
        assert list(packed) == [sum(v * 3**place for place, v in enumerate(f)) for f in fives]
    else:
        number = sum(value << int(bits) * place for place, value in enumerate(values))
        assert packed == number.to_bytes(packed_bytes(len(values), bits), "little")


@pytest.mark.parametrize(("bits", "count", "zero"), [(TERNARY_BITS, 3, 1), (2, 4, 2), (6, 64, 32)])
def test_middle_code_stands_for_the_zero(bits: float, count: int, zero: int) -> None:
    assert (levels(bits), middle(bits)) == (count, zero)


def test_every_byte_unpacks_to_ternary_codes() -> None:
    codes = unpack_codes(torch.arange(256, dtype=torch.uint8), TERNARY_BITS, 1280)
    assert int(codes.max()) == 2
    assert pack_codes(codes[: 5 * 243], TERNARY_BITS).tolist() == list(range(243))


@given(st.lists(st.booleans(), max_size=70))
def test_mask_comes_back(values: list[bool]) -> None:
    packed = pack_mask(torch.tensor(values, dtype=torch.bool))
    assert len(packed) == -(-len(values) // 8)
    assert unpack_mask(packed, len(values)).tolist() == values


def test_packing_leaves_its_argument_alone() -> None:
    codes = torch.arange(16, dtype=torch.uint8)
    for bits in (4, 8):
        pack_codes(codes, bits).zero_()
        assert codes.tolist() == list(range(16))


def test_code_too_large_is_refused() -> None:
    with pytest.raises(ApportionError, match="code 4 does not fit 2 bits"):
        pack_codes(torch.tensor([0, 4], dtype=torch.uint8), 2)
    with pytest.raises(ApportionError, match="code 3 does not fit 1.58 bits"):
        pack_codes(torch.tensor([0, 3], dtype=torch.uint8), TERNARY_BITS)


def test_unknown_bits_are_refused() -> None:
    with pytest.raises(ApportionError, match="7 bits"):
        unpack_codes(torch.zeros(7, dtype=torch.uint8), 7, 8)


@pytest.mark.parametrize("bits", CODE_BITS)
def test_wrong_length_is_refused(bits: float) -> None:
    with pytest.raises(InvalidInput, match="packed bytes"):
        unpack_codes(torch.zeros(100, dtype=torch.uint8), bits, 7)
