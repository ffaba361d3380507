"""Which ranks a percentage of the parameters gives."""

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apportion.kernels.formats import ConvGeometry, LayerShape
from apportion.spaces.compressors.ranks import least_percent, ranks_of

WIDE = ConvGeometry((3, 3), (2, 1), (1, 1), (1, 1))
POINT = ConvGeometry((1, 1), (1, 1), (0, 0), (1, 1))
percents = st.integers(1, 999).map(lambda n: Decimal(n) / 10)


def _shape(out, channels, geometry=WIDE):
    rows, columns = geometry.kernel
    return LayerShape(out, channels * rows * columns, geometry)


def test_one_share_of_both_channel_counts_gives_the_percentage():
    # t^2 64 * 32 * 9 + t (64^2 + 32^2) is half of 64 * 32 * 9 at t = 0.5818: 37.2 and 18.6
    ranks = [ranks_of(Decimal(50), _shape(64, 32), multiple) for multiple in (1, 8)]
    assert ranks == [(37, 18), (32, 16)]


def test_a_share_that_is_met_exactly_is_taken():
    # t = 1 / 2 of 16 and 16 channels: 1280 / 4 + 512 / 2 of 1280
    shape = LayerShape(16, 80, ConvGeometry((1, 5), (1, 1), (0, 0), (1, 1)))
    assert ranks_of(Decimal(45), shape, 8) == (8, 8)
    assert ranks_of(Decimal("44.999"), shape, 8) == (0, 0)


@pytest.mark.parametrize("geometry", [None, POINT])
def test_without_positions_it_is_the_rank_of_a_matrix(geometry):
    assert ranks_of(Decimal(50), LayerShape(192, 512, geometry), 8) == (64, None)


@given(percents, st.integers(1, 40), st.integers(1, 40), st.sampled_from([1, 4, 8]))
def test_parameters_are_at_most_the_percentage_and_ranks_multiples(
    percent, out, channels, multiple
):
    rank, input_rank = ranks_of(percent, _shape(out, channels), multiple)
    assert rank % multiple == input_rank % multiple == 0
    parameters = out * rank + 9 * rank * input_rank + channels * input_rank
    assert 100 * parameters <= percent * out * channels * 9
    assert rank <= 9 * input_rank and input_rank <= 9 * rank and (rank > 0) == (input_rank > 0)


@given(percents, st.integers(8, 40), st.integers(8, 40))
def test_ranks_are_there_from_the_least_percentage_on(percent, out, channels):
    shape = _shape(out, channels)
    assert (ranks_of(percent, shape, 8)[0] > 0) == (percent >= least_percent(shape, 8))
