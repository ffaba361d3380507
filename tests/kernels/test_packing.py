import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from apportion.errors import ApportionError, InvalidInput
from apportion.kernels.packing import (
    CODE_BITS,
    pack_codes,
    pack_mask,
    packed_bytes,
    unpack_codes,
    unpack_mask,
)

BITS = st.sampled_from(CODE_BITS)


@st.composite
def coded(draw: st.DrawFn) -> tuple[int, list[int]]:
    bits = draw(BITS)
    return bits, draw(st.lists(st.integers(0, 2**bits - 1), max_size=70))


@given(coded())
def test_codes_come_back_from_exactly_their_bytes(case: tuple[int, list[int]]) -> None:
    bits, values = case
    codes = torch.tensor(values, dtype=torch.uint8)
    packed = pack_codes(codes, bits)
    assert packed.dtype == torch.uint8 and len(packed) == -(-len(values) * bits // 8)
    assert unpack_codes(packed, bits, len(values)).tolist() == values


@given(coded())
def test_stream_is_little_endian(case: tuple[int, list[int]]) -> None:
    bits, values = case
    number = sum(value << bits * place for place, value in enumerate(values))
    packed = pack_codes(torch.tensor(values, dtype=torch.uint8), bits)
    assert bytes(packed.tolist()) == number.to_bytes(packed_bytes(len(values), bits), "little")


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


def test_unknown_bits_are_refused() -> None:
    with pytest.raises(ApportionError, match="5 bits"):
        unpack_codes(torch.zeros(5, dtype=torch.uint8), 5, 8)


@pytest.mark.parametrize("bits", CODE_BITS)
def test_wrong_length_is_refused(bits: int) -> None:
    with pytest.raises(InvalidInput, match="packed bytes"):
        unpack_codes(torch.zeros(100, dtype=torch.uint8), bits, 7)
