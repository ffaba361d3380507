"""Level configurations go through parsing and printing to the byte, or are refused by the line."""

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apportion.errors import InvalidInput
from apportion.studies.evopress.levels import (
    LEVEL,
    MODULE,
    LevelConfig,
    LevelLine,
    level_line,
    parse_levels,
)

NAMES = st.from_regex(r"model\.layers\.[0-9]{1,2}\.[a-z_]{1,9}", fullmatch=True)
QUANTIZATION = st.sampled_from(["Q2_K", "Q3_K", "Q4_K", "IQ2_XXS", "F16", "F32"])
BITS = st.sampled_from(["1.5625", "2.5625", "3.4375", "4.5", "6.5625", "16", "32"])


@st.composite
def gguf_values(draw: st.DrawFn) -> tuple[str, str | None]:
    bits = draw(BITS)
    spelled = draw(st.sampled_from([bits, str(float(bits))]))
    return spelled, draw(st.none() | QUANTIZATION.map(lambda name: f"{bits}-{name}.pth"))


INTEGERS = st.tuples(st.from_regex("[+-]?[0-9]{1,3}", fullmatch=True), st.none())


@st.composite
def configs(draw: st.DrawFn) -> LevelConfig:
    names = draw(st.lists(NAMES, min_size=1, max_size=8, unique=True))
    cuts = draw(st.lists(st.integers(1, len(names)), max_size=3)) + [0, len(names)]
    values = draw(st.sampled_from([INTEGERS, gguf_values()]))
    ends = sorted(set(cuts))
    groups = [tuple(names[a:b]) for a, b in zip(ends, ends[1:], strict=False)]
    lines = tuple(LevelLine(group, *draw(values)) for group in groups)
    return LevelConfig(lines, draw(st.booleans()))


@given(configs())
def test_level_config_printed_is_parsed_as_itself(config: LevelConfig) -> None:
    assert parse_levels(str(config), "file") == config


@given(
    st.text()
    | st.lists(
        st.sampled_from(["a.q", "b", ": ", ":", "3", "-2", "2.5", " (2.5-Q2_K.pth)", ",", "\n"])
    ).map("".join)
)
def test_any_text_goes_through_to_the_byte_or_is_refused(text: str) -> None:
    try:
        config = parse_levels(text, "file")
    except InvalidInput as refusal:
        assert str(refusal).startswith("file")
        return
    assert str(config) == text


VARIANTS = {
    "quantization, by group": "model.layers.1.q: 3\nmodel.layers.0.q: 4\nmodel.layers.0.up: 2",
    "sparsity, sorted": "model.layers.0.q: -1\nmodel.layers.10.q: 0\nmodel.layers.2.q: 8",
    "trailing newline": "model.layers.0.q: 3\n",
    "merged groups": "model.layers.0.q,model.layers.0.k: 3\nmodel.layers.0.v: 2",
    "spelled numbers": "a: +3\nb: 03\nc: -0\nd: 3.0",
    "GGUF search": "layers.0.q: 2.5625 (2.5625-Q2_K.pth)\nlayers.0.k: 32.0 (32-F32.pth)",
    "GGUF converter": "blk.0.attn_k.weight: 4.5 (4.5-Q4_K.pth)\nblk.0.attn_norm.weight: 32\n",
}


@pytest.mark.parametrize("text", VARIANTS.values(), ids=VARIANTS)
def test_parse_levels_variant_printed_to_the_byte(text: str) -> None:
    assert str(parse_levels(text, "file")) == text


def test_levels_are_named_as_the_files_of_a_database() -> None:
    text = "a: +3\nb,c: -02\nd: 2.5625 (2.5625-Q2_K.pth)\ne: 32.0 (32-F32.pth)\nf: 3.0\ng: -0\n"
    expected = dict(a="3", b="-2", c="-2", d="2.5625-Q2_K", e="32-F32", f="3", g="0")
    assert parse_levels(text, "file").levels == expected


@given(st.from_regex(LEVEL, fullmatch=True), st.from_regex(MODULE, fullmatch=True))
def test_level_line_has_the_level_it_was_made_for(level: str, module: str) -> None:
    line = level_line(module, level)
    assert parse_levels(str(line), "file") == LevelConfig((line,))
    assert line.level == level


@pytest.mark.parametrize(
    ("level", "text"),
    [
        ("3", "m: 3"),
        ("-2", "m: -2"),
        ("2.5625-Q2_K", "m: 2.5625 (2.5625-Q2_K.pth)"),
        ("32-F32", "m: 32.0 (32-F32.pth)"),
    ],
)
def test_level_line_spelled_as_its_program_does(level: str, text: str) -> None:
    assert str(level_line("m", level)) == text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "configuration.txt is empty"),
        ("a: 3\n\nb: 3", "line 2 is blank"),
        ("a: 3\n\n", "line 2 is blank"),
        ("a: 3\r\nb: 3\r\n", "line 1 holds a carriage return"),
        ("a: 3\na.b 3", 'line 2: "a.b 3" has no colon; write "MODULE: 3"'),
        ("a:b: 3", 'line 1: "a:b: 3" has 2 colons'),
        ("a: three", 'line 1: "a: three" has no level'),
        ("a:3", 'line 1: "a:3" has no level after its colon and a space'),
        ("a: 3 ", 'line 1: "a: 3 " has no level'),
        ("a: 2.5 (../2.5-Q2_K.pth)", "has no level"),
        ("a: 2.5 (4.5-Q4_K.pth)", "level 2.5 does not go with 4.5-Q4_K.pth"),
        ("a/b: 3", 'line 1: "a/b" is no path of a layer'),
        ("a,,b: 3", 'line 1: "" is no path of a layer'),
        ("..: 3", 'line 1: ".." is no path of a layer'),
        ("a: 3\nb: 2\na: 2", "line 3: a has a level already, in line 1; a module is named once"),
        ("a,b,a: 3", "line 1: a has a level already, in line 1"),
    ],
)
def test_parse_levels_malformed_refused_with_its_line(text: str, words: str) -> None:
    with pytest.raises(InvalidInput) as refusal:
        parse_levels(text, "configuration.txt")
    assert words in str(refusal.value)
    assert str(refusal.value).startswith("configuration.txt")
    assert "\n" not in str(refusal.value)


@given(gguf_values())
def test_level_number_keeps_its_value(value: tuple[str, str | None]) -> None:
    line = LevelLine(("m",), *value)
    assert Decimal(line.level.partition("-")[0]) == Decimal(line.number)
