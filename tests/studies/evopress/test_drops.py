"""Drop configurations: to the byte and back, and as drops of blocks and sub-blocks."""

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apportion.errors import InvalidInput
from apportion.spaces.sites import Site
from apportion.studies.evopress.drops import (
    PARTS,
    DropConfig,
    configuration_to_drops,
    drops_to_configuration,
    parse_drops,
)

WORDS = st.lists(st.sampled_from(list(PARTS)), min_size=1).map(tuple)
BLOCKS = [Site(f"layers.{i}", "block") for i in range(3)]
SITES = [
    site
    for block in BLOCKS
    for site in (
        block,
        Site(f"{block.name}.self_attn", "attention", parent=block.name),
        Site(f"{block.name}.mlp", "mlp", parent=block.name),
    )
]


@given(WORDS, st.booleans())
def test_drop_config_goes_through_to_the_byte(words: tuple[str, ...], newline: bool) -> None:
    config = DropConfig(words, newline)
    assert parse_drops(str(config), "file") == config
    assert str(config) == "\n".join(words) + ("\n" if newline else "")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("none\nattention\n", 'drops.txt, line 2: "attention" is not one of none, attn, mlp, '),
        ("none\nmlp+attn\n", 'line 2: "mlp+attn" is not one of'),
        ("none\n\nmlp\n", "line 2 is blank"),
        (" none\n", 'line 1: " none" is not one of'),
        ("", "drops.txt is empty"),
    ],
)
def test_parse_drops_malformed_refused_with_its_line(text: str, words: str) -> None:
    with pytest.raises(InvalidInput) as refusal:
        parse_drops(text, "drops.txt")
    assert words in str(refusal.value)


def test_every_list_of_drops_goes_to_a_configuration_and_back() -> None:
    for words in product(PARTS, repeat=len(BLOCKS)):
        dropped = drops_to_configuration(DropConfig(words), SITES)
        for block, word in zip(BLOCKS, words, strict=True):
            assert (f"{block.name}.self_attn" in dropped) == word.startswith("attn")
            assert (f"{block.name}.mlp" in dropped) == word.endswith("mlp")
        assert set(dropped.values()) <= {"drop"}
        assert configuration_to_drops(dropped, SITES) == DropConfig(words)


def test_dropped_block_is_both_sub_blocks() -> None:
    words = ("none", "attn+mlp", "none")
    assert configuration_to_drops({"layers.1": "drop"}, SITES).words == words
    assert drops_to_configuration(DropConfig(words), BLOCKS) == {"layers.1": "drop"}


def test_dropped_block_wins_over_what_lies_in_it() -> None:
    configuration = {"layers.0": "drop", "layers.0.mlp": "keep", "layers.1.mlp": "keep"}
    assert configuration_to_drops(configuration, SITES).words == ("attn+mlp", "none", "none")


def test_drops_to_configuration_other_number_of_blocks_refused() -> None:
    with pytest.raises(InvalidInput, match="has 2 lines, the model 3 blocks; it needs one"):
        drops_to_configuration(DropConfig(("none", "mlp")), SITES)


def test_drops_to_configuration_missing_sub_block_refused() -> None:
    with pytest.raises(InvalidInput, match=r"layers\.2 has 0 mlp sub-blocks"):
        drops_to_configuration(DropConfig(("none", "none", "mlp")), SITES[:-1])


def test_configuration_to_drops_one_of_two_attentions_refused() -> None:
    cross = Site("layers.0.cross_attn", "attention", parent="layers.0")
    with pytest.raises(InvalidInput, match=r"layers\.0 has 2 attention sub-blocks"):
        configuration_to_drops({cross.name: "drop"}, [*SITES, cross])


def test_configuration_to_drops_without_counterpart_refused() -> None:
    inner = Site("layers.0.mlp.inner", "mlp", parent="layers.0.mlp")
    with pytest.raises(InvalidInput, match=r"layers\.0\.mlp\.inner is no block"):
        configuration_to_drops({inner.name: "drop"}, [*SITES, inner])
    with pytest.raises(InvalidInput, match="the model has no blocks"):
        configuration_to_drops({}, [])
