"""The option grammar: parsing and printing are exact inverses, errors name what is right."""

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apportion.errors import InvalidInput
from apportion.spaces.grammar import (
    ALWAYS_SYMMETRIC,
    METHODS,
    STEPS,
    WITH_ZEROS,
    Option,
    parse_option,
)
from apportion.spaces.unrealized import unrealized

NAMED = ("dense", "f32", "bf16", "fp16", "keep", "drop", "drop:mean")
percents = st.integers(1, 99_999).map(lambda n: Decimal(n) / 1000)
patterns = st.integers(2, 16).flatmap(lambda m: st.tuples(st.integers(1, m - 1), st.just(m)))


@st.composite
def weight_fields(draw):
    bits = draw(st.integers(1, 8) | st.just(1.58))
    group = draw(st.none() | st.integers(1, 4096))
    symmetric = bits in ALWAYS_SYMMETRIC or (group is not None and draw(st.booleans()))
    activations = draw(st.sampled_from((None, 8)))
    fields = dict(bits=bits, group=group, symmetric=symmetric, activation_bits=activations)
    return fields | dict(static_activations=activations is not None and draw(st.booleans()))


FIELDS = {
    "c": percents.map(lambda p: {"keep_percent": p}),
    "v": percents.map(lambda p: {"value_percent": p}),
    "q": percents.map(lambda p: {"query_key_percent": p}),
    "s": (percents | patterns).map(lambda s: {"sparsity": s}),
    "r": percents.map(lambda p: {"rank_percent": p}),
    "w": weight_fields(),
    "o": percents.map(lambda p: {"outlier_percent": p}),
    "residual": st.integers(1, 999).map(lambda k: {"residual_rank": k}),
}


def _go_together(steps):
    repairs = steps != {"residual"} and ("w" in steps or "o" not in steps)
    return repairs and len({"c", "v", "q"} & steps) < 2


@st.composite
def stepped(draw):
    chosen = draw(st.sets(st.sampled_from(STEPS), min_size=1).filter(_go_together))
    fields, methods = {}, []
    for step in (step for step in STEPS if step in chosen):
        fields |= draw(FIELDS[step])
        fitting = [m for m in METHODS[step] if m not in WITH_ZEROS or not fields.get("symmetric")]
        if fitting and draw(st.booleans()):
            methods.append((step, draw(st.sampled_from(fitting))))
    if fields.get("bits") == 8:
        fields.pop("outlier_percent", None)
    return Option(**fields, methods=tuple(methods))


operations = st.from_regex(r"[A-Za-z0-9_.-]+", fullmatch=True).map(lambda n: Option(operation=n))
options = st.sampled_from([Option(name=name) for name in NAMED]) | operations | stepped()


@given(options)
def test_parse_of_printed_is_the_same_option(option):
    assert parse_option(str(option)) == option


@given(st.text(alphabet="cvqsrwoagbfp0123456789%:+. ", max_size=16))
def test_parse_of_any_text_prints_it_back_or_is_refused(text):
    try:
        assert str(parse_option(text)) == text
    except InvalidInput as error:
        assert f'option "{text}"' in str(error) and "\n" not in str(error)


@pytest.mark.parametrize(
    "text, option",
    [
        ("s62.5%", Option(sparsity=Decimal("62.5"))),
        ("r50%", Option(rank_percent=Decimal(50))),
        (
            "v50%:svd+w8",
            Option(value_percent=Decimal(50), bits=8, symmetric=True, methods=(("v", "svd"),)),
        ),
        (
            "q75%:svd+w4",
            Option(query_key_percent=Decimal(75), bits=4, methods=(("q", "svd"),)),
        ),
        ("w4+r50", Option(bits=4, residual_rank=50)),
        ("w4g64s", Option(bits=4, group=64, symmetric=True)),
        ("w5g32", Option(bits=5, group=32)),
        ("w1.58", Option(bits=1.58, symmetric=True)),
        ("w1.58g64+r8", Option(bits=1.58, group=64, symmetric=True, residual_rank=8)),
        ("w4g64:hqq", Option(bits=4, group=64, methods=(("w", "hqq"),))),
        ("w4g64s:awq", Option(bits=4, group=64, symmetric=True, methods=(("w", "awq"),))),
        (
            "w3g16+o0.5%+r8",
            Option(bits=3, group=16, outlier_percent=Decimal("0.5"), residual_rank=8),
        ),
        ("w8a8", Option(bits=8, symmetric=True, activation_bits=8)),
        ("w8a8s", Option(bits=8, symmetric=True, activation_bits=8, static_activations=True)),
        ("w4a8sg64", Option(bits=4, group=64, activation_bits=8, static_activations=True)),
        ("w4a8g64s", Option(bits=4, group=64, symmetric=True, activation_bits=8)),
        (
            "w4a8sg64s",
            Option(bits=4, group=64, symmetric=True, activation_bits=8, static_activations=True),
        ),
        ("2:4:wanda+w3", Option(sparsity=(2, 4), bits=3, methods=(("s", "wanda"),))),
    ],
)
def test_parse_of_known_texts_fills_the_fields(text, option):
    assert parse_option(text) == option


@pytest.mark.parametrize(
    "text, told",
    [
        ("w4g", '"w4g" is no option; the step is spelled wN[a8[s]][gK[s]]; nearest: w4, w4g64'),
        ("s150%", "a percentage lies between 0 and 100, both excluded"),
        ("v50", '"v50" is no option; the step is spelled vP%; nearest: v50%'),
        ("v50%:obs", 'unknown method "obs"; known for v: svd, whitened'),
        ("w8+v50%", "steps go in the order c, v, q, s, r, w, o, residual: v50%+w8"),
        (
            "c50%+v75%+w8",
            "c and v are each done to a whole sub-block, not both: c50% or v75%",
        ),
        ("c50%+q75%", "c and q are each done to a whole sub-block, not both: c50% or q75%"),
        (
            "c50%+v75%+q75%",
            "c and v and q are each done to a whole sub-block, not all: c50% or v75% or q75%",
        ),
        ("q50", '"q50" is no option; the step is spelled qP%; nearest: q50%'),
        ("w4+s150%", '"s150%": a percentage lies between'),
        ("w4+s50%", "steps go in the order c, v, q, s, r, w, o, residual: s50%+w4"),
        ("r16+w4g64:rtn", "c, v, q, s, r, w, o, residual: w4g64:rtn+r16"),
        ("r16", "a residual repairs the steps before it: w4g64+r16; a rank alone is r50%"),
        ("s50", "nearest: s50%"),
        ("bf61", "nearest: bf16"),
        ("w4g64+w8", "two w steps"),
        ("dense+w4", '"dense" stands alone'),
        ("drop:mean+w4", '"drop:mean" stands alone and takes no steps'),
        ("c50%+drop:mean", '"drop:mean" stands alone and takes no steps'),
        ("drop:median", "nearest: drop:mean"),
        ("s50%:gptq", 'unknown method "gptq"; known for s: magnitude, wanda'),
        ("s50.0%", "write s50%"),
        ("w8g64s", "write w8g64"),
        ("w4g064", "write w4g64"),
        ("w16", "weights have 1 to 8 bits, or 1.58 (ternary)"),
        ("w1.5", "weights have 1 to 8 bits, or 1.58 (ternary)"),
        ("w1.580", "write w1.58"),
        ("w4.0g64", "write w4g64"),
        ("w1.58g64s", "write w1.58g64"),
        ("w4g64s:hqq", "hqq fits zeros, symmetric weights have none: w4g64:hqq"),
        ("s50%+w8:hqq+r4", "hqq fits zeros, symmetric weights have none: s50%+w8+r4"),
        ("w1.58g64:hqq", "hqq fits zeros, symmetric weights have none: w1.58g64"),
        ("w4a4", "activations have 8 bits: w4a8"),
        ("w4a16s", "activations have 8 bits: w4a8s"),
        ("w8s", "the step is spelled wN[a8[s]][gK[s]]"),
        ("w8a8sg64s", "write w8a8sg64"),
        ("w8a8s+o1%", "8 bits round no weight so badly that it is an outlier: w8a8s"),
        ("w4g0", "a group has at least 1 input: w4g64"),
        ("o1%", "outliers are what a step w does not round: w3g16+o1%"),
        ("s50%+o1%+r8", "outliers are what a step w does not round: w3g16+o1%"),
        ("w8g64+o1%", "8 bits round no weight so badly that it is an outlier: w8g64"),
        ("w8a8+o1%", "8 bits round no weight so badly that it is an outlier: w8a8"),
        ("w3+r8+o1%", "c, v, q, s, r, w, o, residual: w3+o1%+r8"),
        ("w3+o1%:svd", "o takes no method"),
        ("w3+o", "the step is spelled oP%"),
        ("w3+o0%", "a percentage lies between 0 and 100"),
        ("4:2", "N:M keeps N of M weights"),
        ("op:", "op: is followed by a name"),
        ("", "an option is one of dense, f32, bf16"),
    ],
)
def test_parse_of_wrong_text_says_what_is_right(text, told):
    with pytest.raises(InvalidInput) as error:
        parse_option(text)
    assert told in str(error.value)


REALIZED = """dense f32 bf16 keep drop drop:mean w2 w3g64 w4g32s w8 w8g64 w8a8 w8a8s s50% r50%:svd
s50%:magnitude r25%:whitened w4g64+r16 s50%+r8 s60%+w3g64 s50%:wanda+w4g64:rtn+r16 w5 w6g64s
w1.58 w1.58g64 s50%+w1.58g64 w4g64:hqq s50%+w3:hqq+r4 2:4 2:4:magnitude 4:8+w4 1:4+r8 op:conv
c75% c75%:wanda+w4 c50%+r25% w3g16+o1% w1.58g64+o0.5% s50%+w3:gptq+o2%+r8 w4g64:awq w8:awq
s50%+w1.58:awq+o1%+r8 c75%+w3:awq q50% q50%:svd+w4"""
UNREALIZED = "fp16 c75%+w7 r50%+w4 s50%+r50% 2:4+r50% r50%+r8 w1 w7g64 w4a8 w8a8g64 w4a8s"


@pytest.mark.parametrize("text", REALIZED.split())
def test_unrealized_says_nothing_of_realized_options(text):
    assert unrealized(parse_option(text)) is None


@pytest.mark.parametrize(
    "text",
    [*UNREALIZED.split(), "s50%+w8a8", "w8a8+r16", "w1.58a8", "w4a8+o1%", "r50%+w4+o1%"]
    + ["w8a8:awq", "w8a8s:awq", "w8a8sg64", "s50%+w8a8s", "w8a8s+r16", "w4a8sg64s"],
)
def test_unrealized_gives_a_reason_for_the_rest_of_the_grammar(text):
    assert "realized" in (unrealized(parse_option(text)) or "")


@pytest.mark.parametrize(
    "text, needs",
    [("dense", False), ("bf16", False), ("s50%:magnitude", False), ("r50%:svd", False)]
    + [("s50%", True), ("r50%", True), ("w4", True), ("s50%:magnitude+r8:svd", False)]
    + [("w4+o1%", True), ("w4:hqq+o1%", False), ("s50%:magnitude+w4:hqq+o1%+r4:svd", False)]
    + [("c50%:magnitude", True), ("c50%:first", False), ("c50%:first+w4", True), ("v50%", True)]
    + [("v50%:svd", False), ("q50%", True), ("q50%:svd", False)]
    + [("w4:hqq", False), ("s50%+w4:hqq", True), ("2:4:magnitude", False), ("2:4", True)]
    + [("w8a8", True), ("w8a8s", True), ("w4a8:hqq", False), ("w4a8s:hqq", True)]
    + [("w4:awq", True), ("drop", False), ("drop:mean", True)]
    + [("c50%:taylor", True), ("c50%:taylor+w4:hqq", True)],
)
def test_needs_statistics_where_they_change_the_weights(text, needs):
    assert parse_option(text).needs_statistics is needs


@pytest.mark.parametrize(
    "text, needs",
    [("c50%:taylor", True), ("c50%:taylor+w4", True), ("c50%", False), ("c50%:obs+w4", False)],
)
def test_needs_gates_where_taylor_is_asked_for(text, needs):
    assert parse_option(text).needs_gates is needs


def test_is_structure_only_for_keep_and_drops():
    structures = [name for name in NAMED if parse_option(name).is_structure]
    assert structures == ["keep", "drop", "drop:mean"]
    assert [name for name in NAMED if parse_option(name).drops] == structures[1:]
