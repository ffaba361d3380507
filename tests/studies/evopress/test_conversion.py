"""Level configurations as options of sites: equal both ways, or refused with the reason."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apportion.errors import InvalidInput
from apportion.kernels.formats import LayerShape
from apportion.spaces.sites import Member, Site
from apportion.studies.evopress.conversion import configuration_to_levels, levels_to_configuration
from apportion.studies.evopress.levels import parse_levels
from apportion.studies.evopress.scales import BitLevels, Scale, SparsityLevels

BITS = BitLevels({"2": "w2g64", "3": "w3g64", "4": "w4g64"})
GGUF = BitLevels({"2.5625-Q2_K": "w2g16", "4.5-Q4_K": "w4g32", "16-F16": "dense"})
SPARSITY = SparsityLevels(sparsity=0.5, weights_diff=100, num_levels=3)


def _site(parent: str, names: str, shape: tuple[int, int] = (24, 24)) -> Site:
    members = tuple(Member(f"{parent}.{n}", LayerShape(*shape)) for n in names.split("+"))
    return Site(f"{parent}.{names}", "linear", members, parent)


SITES = [
    Site("layers.0", "block"),
    Site("layers.0.attn", "attention", parent="layers.0"),
    _site("layers.0.attn", "q+k+v"),
    _site("layers.0.attn", "o"),
    Site("layers.0.mlp", "mlp", parent="layers.0"),
    _site("layers.0.mlp", "gate+up", (32, 24)),
    _site("layers.0.mlp", "down", (24, 32)),
]
WEIGHT_SITES = [site for site in SITES if site.members]


def _read(text: str, scale: Scale) -> dict[str, str]:
    return levels_to_configuration(parse_levels(text, "file"), SITES, scale)


@pytest.mark.parametrize("scale", [BITS, GGUF, SPARSITY], ids=["bits", "gguf", "sparsity"])
@given(data=st.data())
def test_configuration_to_levels_and_back(scale: Scale, data: st.DataObject) -> None:
    configuration = {}
    for site in data.draw(st.lists(st.sampled_from(WEIGHT_SITES), min_size=1, unique=True)):
        options = list(scale.options(site.members[0]).values())
        configuration[site.name] = data.draw(st.sampled_from(options))
    config = configuration_to_levels(configuration, SITES, scale)
    named = {name: o for name, o in _read(str(config), scale).items() if o != "dense"}
    assert named == {name: o for name, o in configuration.items() if o != "dense"}


def test_levels_in_any_order_are_options_of_their_sites() -> None:
    text = "layers.0.attn.v: 3\nlayers.0.mlp.down: 4\nlayers.0.attn.q: 3\nlayers.0.attn.k: 3\n"
    assert _read(text, BITS) == {"layers.0.attn.q+k+v": "w3g64", "layers.0.mlp.down": "w4g64"}


def test_each_member_gets_its_line_in_the_order_of_the_sites() -> None:
    configuration = {
        "layers.0.mlp.gate+up": "w2g16",
        "layers.0.attn.o": "dense",
        "layers.0.attn": "keep",
    }
    bits = configuration_to_levels(configuration, SITES, GGUF)
    assert str(bits).split("\n")[-2:] == [
        "layers.0.mlp.up: 2.5625 (2.5625-Q2_K.pth)",
        "layers.0.mlp.down: 16.0 (16-F16.pth)",
    ]
    assert not bits.trailing_newline


def test_dense_and_structure_sites_get_no_line() -> None:
    configuration = {
        "layers.0.attn": "drop",
        "layers.0.attn.o": "dense",
        "layers.0.mlp.down": "w4g64",
    }
    assert str(configuration_to_levels(configuration, SITES, BITS)) == "layers.0.mlp.down: 4"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "layers.0.attn.q: 3\nlayers.0.attn.k: 4\nlayers.0.attn.v: 3",
            "layers.0.attn.q+k+v is one choice, but its members differ: layers.0.attn.q at 3 "
            "(w3g64), layers.0.attn.k at 4 (w4g64), layers.0.attn.v at 3 (w3g64); give all",
        ),
        (
            "layers.0.mlp.gate: 3",
            "layers.0.mlp.gate+up is one choice, but layers.0.mlp.up has no level; name every",
        ),
        ("layers.0.attn.oo: 3", '"layers.0.attn.oo" has a level, but no site holds it; nearest: '),
        ("layers.0.attn.o: 5", "layers.0.attn.o: level 5 is no option; levels: 2, 3, 4"),
    ],
)
def test_levels_without_counterpart_refused(text: str, words: str) -> None:
    with pytest.raises(InvalidInput) as refusal:
        _read(text, BITS)
    assert words in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("configuration", "words"),
    [
        ({"layers.0.attn.o": "r50%"}, '"r50%" is no level of layers.0.attn.o; its levels: w2g64'),
        ({"layers.0.attn.x": "w2g64"}, 'no site "layers.0.attn.x" in this model'),
        ({"layers.0.attn.o": "dense"}, "no site has a level"),
    ],
)
def test_configuration_without_counterpart_refused(
    configuration: dict[str, str], words: str
) -> None:
    with pytest.raises(InvalidInput) as refusal:
        configuration_to_levels(configuration, SITES, BITS)
    assert words in str(refusal.value)


def test_same_step_of_unequal_members_refused() -> None:
    members = (Member("a.q", LayerShape(24, 24)), Member("a.k", LayerShape(12, 24)))
    sites = [Site("a.q+k", "linear", members)]
    level_0 = parse_levels("a.q: 0\na.k: 0", "file")
    assert levels_to_configuration(level_0, sites, SPARSITY) == {"a.q+k": "s50%"}
    level_1 = parse_levels("a.q: 1\na.k: 1", "file")
    with pytest.raises(InvalidInput, match=r"a\.q at 1 \(s67\.36.*%\), a\.k at 1 \(s84\.72"):
        levels_to_configuration(level_1, sites, SPARSITY)
