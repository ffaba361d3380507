"""OWL's allocation: each block's sparsity, rounded to the options of the space."""

import pytest

from apportion.errors import InvalidInput
from apportion.kernels.formats import LayerShape
from apportion.spaces.grammar import parse_option
from apportion.spaces.sites import Member, Site
from apportion.spaces.space import Space
from apportion.studies.owl import check_levels, owl_configurations

BLOCKS = [Site(f"blocks.{number}", "block") for number in range(4)]
LEVELS = "dense w8 s40% s45% s50% s55% s60% s50%+w4g32 s60%+w4g32 s50%:magnitude 2:4"


def space_of(*rows: str) -> Space:
    """A block with one layer for each row of options, and a head behind them."""
    names = [f"blocks.{number}.up" for number in range(len(rows) - 1)] + ["head"]
    sites = [Site(n, "linear", (Member(n, LayerShape(32, 32)),)) for n in names]
    return Space(tuple(sites), tuple(tuple(map(parse_option, row.split())) for row in rows))


SPACE = space_of(*[LEVELS] * 5)
OUTLIERS = {"blocks.0": 0.01, "blocks.1": 0.03, "blocks.2": 0.02, "blocks.3": 0.01}


def uniform(*texts: str) -> dict[str, tuple[int, ...]]:
    return {text: tuple(row.index(text) for row in SPACE.texts) for text in texts}


def options(configuration: tuple[int, ...]) -> list[str]:
    return list(SPACE.configuration(configuration).values())


def test_sites_take_the_level_nearest_to_their_blocks_sparsity() -> None:
    # by hand: 56, 40, 48 and 56 % of the blocks
    found = owl_configurations(SPACE, uniform("s50%"), OUTLIERS, BLOCKS)
    assert options(found["s50%"]) == ["s55%", "s40%", "s50%", "s55%", "s50%"]


def test_levels_differ_in_nothing_else() -> None:
    found = owl_configurations(SPACE, uniform("s60%+w4g32"), OUTLIERS, BLOCKS)
    assert options(found["s60%+w4g32"]) == [
        *("s60%+w4g32", "s50%+w4g32", "s60%+w4g32", "s60%+w4g32", "s60%+w4g32"),
    ]


@pytest.mark.parametrize("text", ["w8", "2:4", "s50%:magnitude"])
def test_option_without_other_levels_has_no_allocation(text: str) -> None:
    assert owl_configurations(SPACE, uniform(text), OUTLIERS, BLOCKS) == {}


def test_equal_blocks_add_nothing() -> None:
    same = dict.fromkeys(OUTLIERS, 0.02)
    assert owl_configurations(SPACE, uniform("s50%"), same, BLOCKS) == {}
    assert owl_configurations(SPACE, uniform("s50%"), {}, BLOCKS) == {}


def test_sites_that_take_another_option_stay() -> None:
    mixed = (2, *uniform("s50%")["s50%"][1:])
    found = owl_configurations(SPACE, {"s50%": mixed}, OUTLIERS, BLOCKS)
    assert options(found["s50%"])[0] == "s40%"


def test_of_two_as_near_less_is_removed() -> None:
    space = space_of("dense s56% s50% s60%", "dense s44% s50% s40%", "dense s50%")
    outliers = {"blocks.0": 0.0, "blocks.1": 1.0}  # 58 and 42 %
    found = owl_configurations(space, {"s50%": (2, 2, 1)}, outliers, BLOCKS)
    assert list(space.configuration(found["s50%"]).values()) == ["s56%", "s40%", "s50%"]


def test_space_without_levels_is_refused() -> None:
    check_levels(space_of("dense s50%", "dense s40%+w8 s50%+w8", "dense"))
    with pytest.raises(InvalidInput, match=r"no site of this space has two options .* s40%, s50%"):
        check_levels(space_of("dense s50% s60%:magnitude 2:4 1:4", "dense s40%", "dense"))
