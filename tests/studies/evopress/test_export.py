"""Which options are levels of EvoPress."""

import pytest

from apportion.errors import InvalidInput
from apportion.spaces.grammar import parse_option
from apportion.spaces.sites import Cached, Site
from apportion.spaces.space import Space
from apportion.studies.evopress.export import bit_levels, check_words


def test_each_number_of_bits_is_a_level() -> None:
    assert bit_levels({"w8", "w4g64", "w3g64:hqq"}).option_of == {
        "3": "w3g64:hqq",
        "4": "w4g64",
        "8": "w8",
    }


@pytest.mark.parametrize("option", ["r50%", "s50%", "w8a8", "bf16", "w1.58g64", "s50%+w4g64"])
def test_what_is_no_number_of_bits_is_refused(option: str) -> None:
    with pytest.raises(InvalidInput, match="is no level of EvoPress"):
        bit_levels({"w4g64", option})


def test_two_options_of_one_level_are_refused() -> None:
    with pytest.raises(InvalidInput, match='"w4g32" and "w4g64" are both level 4'):
        bit_levels({"w4g64", "w4g32"})


def test_a_constant_in_place_of_a_sub_block_has_no_word() -> None:
    options = tuple(map(parse_option, ("keep", "drop", "drop:mean")))
    space = Space((Site("mlp", "mlp", constant=(8,)),), (options,))
    check_words({"mlp": "drop"}, space)
    with pytest.raises(InvalidInput, match='mlp: EvoPress has no level for "drop:mean"'):
        check_words({"mlp": "drop:mean"}, space)


def test_a_packed_cache_has_no_word() -> None:
    cached = Cached("past_key_values", 0, 1, 8, 8)
    sites = (Site("attention", "attention"), Site("attention.cache", "cache", cache=cached))
    options = [tuple(map(parse_option, texts)) for texts in (("keep", "drop"), ("keep", "k4v4"))]
    space = Space(sites, tuple(options))
    check_words({"attention": "drop", "attention.cache": "keep"}, space)
    with pytest.raises(InvalidInput, match='attention.cache: EvoPress has no level for "k4v4"'):
        check_words({"attention": "keep", "attention.cache": "k4v4"}, space)
