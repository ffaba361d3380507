"""Start configurations in files: what tells their form, and what the space does not hold."""

import json
from pathlib import Path
from typing import Any

import pytest

from apportion.errors import InvalidInput
from apportion.kernels.formats import LayerShape
from apportion.spaces.grammar import parse_option
from apportion.spaces.sites import Member, Site
from apportion.spaces.space import Space
from apportion.studies.start_files import read_start


def layers(parent: str, names: str) -> Site:
    members = tuple(Member(f"{parent}.{n}", LayerShape(32, 32)) for n in names.split("+"))
    return Site(f"{parent}.{names}", "linear", members, parent)


def block(name: str) -> list[Site]:
    return [
        Site(name, "block"),
        Site(f"{name}.attn", "attention", parent=name),
        layers(f"{name}.attn", "q+k"),
        Site(f"{name}.mlp", "mlp", parent=name),
        layers(f"{name}.mlp", "up"),
    ]


def space_of(sites: list[Site], options: dict[str, str]) -> Space:
    """The sites whose kind has options."""
    chosen = [site for site in sites if site.kind in options]
    rows = [tuple(map(parse_option, options[site.kind].split())) for site in chosen]
    return Space(tuple(chosen), tuple(rows))


SITES = [*block("layers.0"), *block("layers.1"), layers("lm", "head")]
BITS = "dense w8 w4g32 w4g32:gptq w3g32 w3g32+r4 w8a8 s50%+w2g32 s50%"
SPACE = space_of(SITES[:-1], {"linear": BITS, "attention": "keep drop", "mlp": "keep drop"})
EVERY = "\n".join(f"layers.{i}.{n}: 4" for i in (0, 1) for n in ("attn.q", "attn.k", "mlp.up"))


@pytest.fixture(name="read")
def _read(tmp_path: Path) -> Any:
    def read(text: str, space: Space = SPACE) -> dict[str, str]:
        file = tmp_path / "start"
        file.write_text(text)
        return read_start(file, space, SITES)

    return read


def test_bits_are_the_first_option_that_only_has_them(read: Any) -> None:
    found = read(EVERY.replace("mlp.up: 4", "mlp.up: 3"))
    assert found == {
        f"layers.{i}.{name}": option
        for i in (0, 1)
        for name, option in (("attn.q+k", "w4g32"), ("mlp.up", "w3g32"))
    }


@pytest.mark.parametrize(
    ("level", "option"),
    [
        ("8", "w8"),
        ("16", "dense"),
        ("32.0", "dense"),
        ("3.4375 (3.4375-Q3_K.pth)", "w3g32"),
        ("4.5 (4.5-Q4_K.pth)", "w4g32"),
        ("16.0 (16-F16.pth)", "dense"),
    ],
)
def test_levels_of_both_programs_are_options(read: Any, level: str, option: str) -> None:
    assert read(f"layers.1.mlp.up: {level}\n") == {"layers.1.mlp.up": option}


def test_layer_outside_of_the_space_may_be_dense(read: Any) -> None:
    assert read("lm.head: 16\nlayers.0.mlp.up: 3") == {"layers.0.mlp.up": "w3g32"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("lm.head: 4", "lm.head has level 4, but lm.head is no site of this space and stays dense"),
        ("layers.0.mlp.upp: 4", 'no site holds it; nearest: "layers.0.mlp.up"'),
        ("layers.0.mlp.up: 5", "layers.0.mlp.up: level 5 is no option; levels: 16, 8, 4, 3"),
        ("layers.0.mlp.up: 5.5 (5.5-Q5_K.pth)", "level 5.5-Q5_K is no option; levels: 16, 8"),
        ("layers.0.attn.q: 4", "is one choice, but layers.0.attn.k has no level"),
        ("layers.0.attn.q: 4\nlayers.0.attn.k: 3", "its members differ"),
        ("layers.0.mlp.up: -2", "has level -2, a step of sparsity"),
        ("layers.0.mlp.up: 0", "has level 0, a step of sparsity"),
        ("layers.0.mlp.up: 4\nlayers.0", "line 2"),
    ],
)
def test_level_that_the_space_lacks_is_refused(read: Any, text: str, words: str) -> None:
    with pytest.raises(InvalidInput, match="start: ") as refusal:
        read(text)
    assert words in str(refusal.value)


def test_drops_are_those_of_sub_blocks(read: Any) -> None:
    assert read("attn\nattn+mlp\n") == {
        f"layers.{name}": "drop" for name in ("0.attn", "1.attn", "1.mlp")
    }
    assert read("none\nnone") == {}


def test_drops_of_both_parts_are_those_of_a_block_that_alone_can_be_dropped(read: Any) -> None:
    blocks = space_of(SITES, {"block": "keep drop", "attention": "keep"})
    assert read("none\nattn+mlp", blocks) == {"layers.1": "drop"}
    with pytest.raises(InvalidInput, match=r'layers\.0\.attn has no option "drop"; it has keep'):
        read("attn\nattn+mlp", blocks)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("attn\nfoo", 'line 2: "foo" is not one of none, attn'),
        ("attn", "has 1 lines, the model 2 blocks"),
    ],
)
def test_drop_that_the_space_lacks_is_refused(read: Any, text: str, words: str) -> None:
    with pytest.raises(InvalidInput) as refusal:
        read(text)
    assert words in str(refusal.value)


CONFIGURATION = {"layers.0.mlp.up": "w3g32+r4", "layers.1.attn": "drop", "layers.0": "keep"}
POINT = {"number": 7, "configuration": CONFIGURATION}
JSON_FORMS = {
    "plain": CONFIGURATION,
    "point": POINT,
    "apportion.json": {"format_version": 1, "configuration": CONFIGURATION, "sites": []},
    "report.json": {"study": "x", "point": POINT},
    "show --json": {"winner": 7, "front": [{"number": 3, "configuration": {}}, POINT]},
}


@pytest.mark.parametrize("form", JSON_FORMS)
def test_json_of_ours_is_read_without_what_stays_as_it_is(read: Any, form: str) -> None:
    found = read(json.dumps(JSON_FORMS[form]))
    assert found == {"layers.0.mlp.up": "w3g32+r4", "layers.1.attn": "drop"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"layers.0.mlp.up": "w5g32"}', 'layers.0.mlp.up has no option "w5g32"; it has dense, w8'),
        ('{"layers.0.mlp.u": "w8"}', 'did you mean "layers.0.mlp.up"?'),
        ('{"lm.head": "w8"}', 'no site "lm.head" in this space'),
        ('{"layers.0.mlp.up": 4}', "holds no configuration; right would be a level"),
        ("{}", "holds no configuration"),
        ('{"winner": 7, "front": [3, {"number": 1}]}', "holds no configuration"),
        ('{"layers.0.mlp.up"', "is no JSON: line 1"),
        ("hello\n", "is no configuration; right would be a level"),
        ("", "is no configuration"),
    ],
)
def test_file_of_nothing_that_the_space_holds_is_refused(read: Any, text: str, words: str) -> None:
    with pytest.raises(InvalidInput) as refusal:
        read(text)
    assert words in str(refusal.value)


def test_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "start"
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(InvalidInput, match="is no UTF-8 text"):
        read_start(file, SPACE, SITES)
