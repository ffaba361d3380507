"""Levels mean what EvoPress means by them."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apportion.errors import InvalidInput
from apportion.kernels.formats import LayerShape
from apportion.spaces.grammar import parse_option
from apportion.spaces.sites import Member
from apportion.studies.evopress.scales import BitLevels, SparsityLevels


def _member(out_features: int, in_features: int) -> Member:
    return Member("layer", LayerShape(out_features, in_features))


@pytest.mark.parametrize(
    ("shape", "first", "last"),
    [((1024, 4096), -2, 1), ((4096, 4096), -8, 5), ((14336, 4096), -8, 8)],
    ids=["k and v", "q and o", "mlp"],
)
def test_sparsity_levels_of_mistral_at_70_percent(
    shape: tuple[int, int], first: int, last: int
) -> None:
    scale = SparsityLevels(sparsity=0.7, weights_diff=1_000_000, num_levels=8)
    levels = list(map(int, scale.options(_member(*shape))))
    assert levels == list(range(first, last + 1))


@given(
    st.integers(1, 99),
    st.integers(1, 5000),
    st.integers(0, 12),
    st.tuples(st.integers(1, 200), st.integers(1, 200)),
)
def test_sparsity_options_remove_the_weights_of_their_level(
    percent: int, diff: int, count: int, shape: tuple[int, int]
) -> None:
    options = SparsityLevels(percent / 100, diff, count).options(_member(*shape))
    weights = shape[0] * shape[1]
    assert options["0"] == f"s{percent}%"
    assert len(set(options.values())) == len(options)
    for level, text in options.items():
        share = Fraction(percent, 100) + Fraction(int(level) * diff, weights)
        assert 0 <= share < 1 and abs(int(level)) <= count
        removed = 0 if text == "dense" else Fraction(parse_option(text).sparsity) / 100
        assert abs(removed - share) <= Fraction(1, 10**11)


def test_sparsity_level_of_nothing_is_dense_and_of_everything_is_none() -> None:
    options = SparsityLevels(0.5, 50, 8).options(_member(10, 10))
    assert options == {"-1": "dense", "0": "s50%"}


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ((1.5, 10, 2), "sparsity 1.5 is not between 0 and 1"),
        ((float("nan"), 10, 2), "sparsity nan"),
        ((0.5, 0, 2), "weights_diff 0 is below 1"),
        ((0.5, 10, -1), "num_levels -1 is below 0"),
    ],
)
def test_sparsity_levels_out_of_range_refused(numbers: tuple[float, int, int], words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        SparsityLevels(*numbers)


@pytest.mark.parametrize(
    ("option_of", "words"),
    [
        ({"3": "w4g64"}, 'level 3: "w4g64" does not have 3 bits'),
        ({"3": "dense"}, 'level 3: "dense" does not have 3 bits'),
        ({"3": "drop"}, 'level 3: "drop" is no option of weights'),
        ({"2.5625-Q2_K": "w2q16"}, 'option "w2q16"'),
        ({"4.5-Q4_K": "w4g32", "4.5-Q4_0": "w4g32"}, "levels 4.5-Q4_K and 4.5-Q4_0 are both"),
    ],
)
def test_bit_levels_wrong_option_refused(option_of: dict[str, str], words: str) -> None:
    with pytest.raises(InvalidInput) as refusal:
        BitLevels(option_of)
    assert words in str(refusal.value)


def test_bit_levels_are_the_options_given() -> None:
    option_of = {"3": "w3g64", "2.5625-Q2_K": "w2g16", "16-F16": "bf16", "16": "dense"}
    assert BitLevels(option_of).options(_member(2, 2)) == option_of
