import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from apportion.errors import InvalidInput
from apportion.kernels.packing import unpack_mask
from apportion.kernels.positions import counts_bytes, pack_positions, unpack_positions


@st.composite
def some_of_many(draw: st.DrawFn) -> tuple[list[int], int]:
    size = draw(st.integers(1, 1500))
    return sorted(draw(st.sets(st.integers(0, size - 1), max_size=60))), size


@given(some_of_many())
def test_positions_come_back_from_exactly_their_bytes(case: tuple[list[int], int]) -> None:
    positions, size = case
    places, counts = pack_positions(torch.tensor(positions, dtype=torch.int64), size)
    assert places.dtype == counts.dtype == torch.uint8 and len(places) == len(positions)
    assert len(counts) == counts_bytes(len(positions), size)
    assert len(counts) == math.ceil((len(positions) + math.ceil(size / 256)) / 8)
    assert unpack_positions(places, counts, size).tolist() == positions


def test_each_block_of_256_has_its_ones_and_a_zero() -> None:
    places, counts = pack_positions(torch.tensor([3, 255, 256, 1000]), 1100)
    assert places.tolist() == [3, 255, 0, 1000 % 256]
    bits = [1, 1, 0, 1, 0, 0, 1, 0, 0]
    assert unpack_mask(counts, 9).tolist() == [bool(bit) for bit in bits]


@pytest.mark.parametrize(("share", "bits"), [(0.001, 12.91), (0.01, 9.40), (0.1, 9.04)])
def test_a_position_takes_the_bits_that_are_promised(share: float, bits: float) -> None:
    size = 1 << 20
    count = int(share * size)
    assert 8 * (count + counts_bytes(count, size)) / count == pytest.approx(bits, abs=0.01)


@pytest.mark.parametrize(
    ("places", "ones"),
    [([3, 9], [0, 1, 2]), ([3, 9], [0]), ([9, 3], [0, 1]), ([3, 3], [0, 1]), ([3, 60], [0, 3])],
    ids=["too many", "too few", "not ascending", "twice", "behind the end"],
)
def test_damaged_positions_are_refused(places: list[int], ones: list[int]) -> None:
    byte = torch.tensor([sum(1 << bit for bit in ones)], dtype=torch.uint8)
    with pytest.raises(InvalidInput, match="positions"):
        unpack_positions(torch.tensor(places, dtype=torch.uint8), byte, 300)
