"""The option grammar: what can be done to a site, as text and as a value.

`option = dense | f32 | bf16 | fp16 | keep | drop | drop:mean | op:NAME | kNvM | step(+step)*`. One
option has one spelling: `parse_option` and `str` are exact inverses, anything else is refused with
the right one.
"""

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any

from apportion.errors import InvalidInput
from apportion.kernels.codes import CACHE_BITS, TERNARY_BITS

DROPS = ("drop", "drop:mean")
STRUCTURE_NAMES = ("keep", *DROPS)
NAMES = ("dense", "f32", "bf16", "fp16", *STRUCTURE_NAMES)
STEPS = ("c", "v", "q", "s", "r", "w", "o", "residual")
NARROWING = ("c", "v", "q")
"""Steps that are each a treatment of a whole sub-block."""
ORDER = ", ".join(STEPS)
METHODS: Mapping[str, tuple[str, ...]] = {
    "c": ("first", "magnitude", "wanda", "obs", "chip", "taylor", "drop", "merge"),
    "v": ("svd", "whitened"),
    "q": ("svd", "whitened"),
    "s": ("magnitude", "wanda", "sparsegpt"),
    "r": ("svd", "whitened"),
    "w": ("rtn", "hqq", "gptq", "awq"),
    "o": (),
    "residual": ("svd", "whitened"),
}
WITHOUT_STATISTICS = ("first", "magnitude", "svd", "hqq")
WITH_ZEROS = ("hqq",)
"""Methods that fit the zeros, and so are for weights that have some."""
ALWAYS_SYMMETRIC = (TERNARY_BITS, 8)
BITS = "weights have 1 to 8 bits, or 1.58 (ternary)"

_OPERATION = re.compile(r"op:([A-Za-z0-9_.-]+)")
_CACHE = re.compile(r"k([0-9]{1,9})v([0-9]{1,9})")
_STEP = re.compile(
    r"(?:(?P<percent_step>[cvqsro])(?P<percent>[0-9]{1,9}(?:\.[0-9]{1,9})?)%"
    r"|(?P<kept>[0-9]{1,9}):(?P<of>[0-9]{1,9})"
    r"|w(?P<bits>[0-9]{1,9}(?:\.[0-9]{1,9})?)"
    r"(?:a(?P<activation_bits>[0-9]{1,9})(?P<static>s?))?(?:g(?P<group>[0-9]{1,9})(?P<symmetric>s?))?"
    r"|r(?P<residual_rank>[0-9]{1,9}))"
    r"(?::(?P<method>[^+:]*))?"
)
_FORMS = {
    "c": "cP%",
    "v": "vP%",
    "q": "qP%",
    "s": "sP%",
    "r": "rP%, or rK at the end",
    "w": "wN[a8[s]][gK[s]]",
    "o": "oP%, or op:NAME alone",
}
_PERCENTS = {
    "c": "keep_percent",
    "v": "value_percent",
    "q": "query_key_percent",
    "s": "sparsity",
    "r": "rank_percent",
    "o": "outlier_percent",
}
_SPELLINGS = (*NAMES, "op:NAME", "c75%", "v50%", "q50%", "s50%", "2:4", "r50%", "r16", "w1.58g64",
              "w2g64", "w3g64", "w4", "w4g32", "w4g64", "w4g128", "w4g64s", "w8", "w8a8", "o1%",
              "k8v8", "k4v4")  # fmt: skip


@dataclass(frozen=True)
class Option:
    """One treatment of a site. Made by `parse_option`; `str` gives the canonical text."""

    name: str | None = None
    operation: str | None = None
    cache_bits: tuple[int, int] | None = None
    """Of the keys and of the values that a cache holds."""
    keep_percent: Decimal | None = None
    value_percent: Decimal | None = None
    query_key_percent: Decimal | None = None
    sparsity: Decimal | tuple[int, int] | None = None
    """The percentage of weights removed, or (n, m): n of every m weights are kept."""
    rank_percent: Decimal | None = None
    bits: float | None = None
    """Whole, or `TERNARY_BITS`."""
    activation_bits: int | None = None
    static_activations: bool = False
    """One scale for all inputs, fixed by calibration; otherwise one per token."""
    group: int | None = None
    """Inputs per scale; None: one scale per output channel."""
    symmetric: bool = False
    """No zero point: ternary and 8-bit options, others where `s` follows the group."""
    outlier_percent: Decimal | None = None
    """The percentage of weights that are not rounded but kept in bfloat16."""
    residual_rank: int | None = None
    methods: tuple[tuple[str, str], ...] = ()
    """(step, method) in the order of `STEPS`, only those that were asked for."""

    def __str__(self) -> str:
        if self.name is not None:
            return self.name
        if self.operation is not None:
            return f"op:{self.operation}"
        if self.cache_bits is not None:
            return "k{}v{}".format(*self.cache_bits)
        methods = dict(self.methods)
        texts = ((step, self._step(step)) for step in STEPS)
        return "+".join(
            f"{text}:{methods[step]}" if step in methods else text for step, text in texts if text
        )

    def _step(self, step: str) -> str:
        """The text of one step without its method; empty where the option has no such step."""
        if step == "s" and isinstance(self.sparsity, tuple):
            return "{}:{}".format(*self.sparsity)
        percent = getattr(self, _PERCENTS[step]) if step in _PERCENTS else None
        if isinstance(percent, Decimal):
            return f"{step}{percent.normalize():f}%"
        if step == "residual" and self.residual_rank is not None:
            return f"r{self.residual_rank}"
        if step != "w" or self.bits is None:
            return ""
        activations = "" if self.activation_bits is None else f"a{self.activation_bits}"
        activations += "s" if self.static_activations else ""
        group = "" if self.group is None else f"g{self.group}"
        plain = self.group is None or self.bits in ALWAYS_SYMMETRIC
        suffix = "s" if self.symmetric and not plain else ""
        return f"w{self.bits}{activations}{group}{suffix}"

    @property
    def without_methods(self) -> str:
        """Its text as if no method had been asked for."""
        return str(replace(self, methods=()))

    @property
    def steps(self) -> tuple[str, ...]:
        """The steps that this option has, in their order; none for named options."""
        return tuple(step for step in STEPS if self._step(step))

    @property
    def is_structure(self) -> bool:
        """True for what sites without weights have: `keep`, drops, cP%, vP%, qP%, op:NAME, kNvM."""
        named = self.name in STRUCTURE_NAMES or self.operation is not None
        return named or self.cache_bits is not None or self.narrows

    @property
    def drops(self) -> bool:
        """True for `drop` and `drop:mean`: the sub-block goes, at most a constant is left."""
        return self.name in DROPS

    @property
    def narrows(self) -> bool:
        """True for `cP%`, `vP%`, `qP%` and what is composed with them: whole treatments of a
        sub-block."""
        return self.keep_percent is not None or self.dimension_percent is not None

    @property
    def dimension_percent(self) -> Decimal | None:
        """P of `vP%` or `qP%`, which leave fewer dimensions of every head; None of any other."""
        return self.query_key_percent if self.value_percent is None else self.value_percent

    @property
    def rest(self) -> "Option":
        """What is left to do with weights that were made narrower; `dense` if nothing."""
        methods = tuple(pair for pair in self.methods if pair[0] not in NARROWING)
        gone: dict[str, Any] = {_PERCENTS[step]: None for step in NARROWING}
        rest = replace(self, **gone, methods=methods)
        return rest if rest.steps else Option(name="dense")

    @property
    def scales_inputs(self) -> bool:
        """True where each input is multiplied by a stored scale before the weights are."""
        return ("w", "awq") in self.methods

    @property
    def needs_statistics(self) -> bool:
        """True where what is realized depends on calibration's statistics, if there are some."""
        methods = dict(self.methods)
        # Outliers follow what rounds the rest: those of a method without statistics need none.
        choosing = [methods.get(step) for step in self.steps if step != "o"]
        fixed = self.static_activations or self.name == "drop:mean"
        # Whatever chose the units that stay, what reads them is corrected on its inputs.
        corrected = self.keep_percent is not None and methods.get("c") != "first"
        return fixed or corrected or any(m not in WITHOUT_STATISTICS for m in choosing)

    @property
    def needs_gates(self) -> bool:
        """True where what goes depends on gradients of the model's loss (`gates.gate_scores`)."""
        return ("c", "taylor") in self.methods


def parse_option(text: str) -> Option:
    """The option that `text` spells.

    Raises:
        InvalidInput: `text` is no option; names the part that is wrong and what would be right.
    """
    if text in NAMES:
        return Option(name=text)
    if text.startswith("op:"):
        match = _OPERATION.fullmatch(text)
        if match is None:
            raise _wrong(text, "op: is followed by a name of letters, digits, _, . and -")
        return Option(operation=match[1])
    if (match := _CACHE.fullmatch(text)) is not None:
        return _cache_option(text, int(match[1]), int(match[2]))
    fields: dict[str, Any] = {}
    methods: dict[str, str] = {}
    seen: list[str] = []
    for part in text.split("+"):
        step, values, method = _parse_step(text, part)
        if step in seen:
            raise _wrong(text, f"two {step} steps; an option has each step at most once")
        seen.append(step)
        fields |= values
        if method is not None:
            methods[step] = method
    option = Option(**fields, methods=tuple((s, methods[s]) for s in STEPS if s in methods))
    _check_whole(text, option, seen)
    return option


def _cache_option(text: str, key_bits: int, value_bits: int) -> Option:
    option = Option(cache_bits=(key_bits, value_bits))
    if not {key_bits, value_bits} <= set(CACHE_BITS):
        known = ", ".join(map(str, CACHE_BITS))
        raise _wrong(text, f"keys and values of a cache have {known} bits, such as k4v4")
    if str(option) != text:
        raise _wrong(text, f"write {option}")
    return option


def names_cache(text: str) -> bool:
    """Whether a text is spelled like an option of caches, `kNvM`, with bits that exist or not."""
    return _CACHE.fullmatch(text) is not None


def _check_whole(text: str, option: Option, seen: list[str]) -> None:
    if seen == ["residual"]:
        rank = option.residual_rank
        raise _wrong(
            text, f"a residual repairs the steps before it: w4g64+r{rank}; a rank alone is r50%"
        )
    if len(whole := [step for step in NARROWING if option._step(step)]) > 1:
        either = " or ".join(map(option._step, whole))
        told = f"{' and '.join(whole)} are each done to a whole sub-block"
        raise _wrong(text, f"{told}, not {'both' if len(whole) == 2 else 'all'}: {either}")
    if seen != sorted(seen, key=STEPS.index):
        raise _wrong(text, f"steps go in the order {ORDER}: {option}")
    if str(option) != text:
        raise _wrong(text, f"write {option}")
    if option.outlier_percent is not None:
        _check_outliers(text, option)
    method = dict(option.methods).get("w")
    if method in WITH_ZEROS and option.symmetric:
        raise _wrong(text, f"{method} fits zeros, symmetric weights have none: {_fitting(option)}")


def _check_outliers(text: str, option: Option) -> None:
    if option.bits is None:
        outliers = option._step("o")
        raise _wrong(text, f"outliers are what a step w does not round: w3g16+{outliers}")
    if option.bits == 8:
        rest = replace(option, outlier_percent=None)
        raise _wrong(text, f"8 bits round no weight so badly that it is an outlier: {rest}")


def _fitting(option: Option) -> Option:
    """The same with zeros where its bits can have them, else without a method for its weights."""
    if option.bits not in ALWAYS_SYMMETRIC:
        return replace(option, symmetric=False)
    return replace(option, methods=tuple(pair for pair in option.methods if pair[0] != "w"))


def _parse_step(text: str, part: str) -> tuple[str, dict[str, Any], str | None]:
    """(step, fields of the option, method) of one part between plus signs."""
    match = _STEP.fullmatch(part)
    if match is None:
        raise _wrong(text, _unknown(text, part))
    if match["percent"] is not None:
        step = match["percent_step"]
        values: dict[str, Any] = {_PERCENTS[step]: _percent(text, part, match["percent"])}
    elif match["kept"] is not None:
        step, values = "s", {"sparsity": _pattern(text, part, match["kept"], match["of"])}
    elif match["bits"] is not None:
        step, values = "w", _weight_fields(text, part, match)
    else:
        step, values = "residual", {"residual_rank": int(match["residual_rank"])}
        if values["residual_rank"] < 1:
            raise _wrong(text, "a rank is at least 1", part)
    return step, values, _method(text, part, step, match["method"])


def _percent(text: str, part: str, digits: str) -> Decimal:
    percent = Decimal(digits)
    if not 0 < percent < 100:
        raise _wrong(text, "a percentage lies between 0 and 100, both excluded", part)
    return percent


def _pattern(text: str, part: str, kept: str, of: str) -> tuple[int, int]:
    if not 0 < int(kept) < int(of):
        raise _wrong(text, "N:M keeps N of M weights, 0 < N < M, such as 2:4", part)
    return int(kept), int(of)


def _weight_fields(text: str, part: str, match: re.Match[str]) -> dict[str, Any]:
    group = match["group"]
    bits = _bits(match["bits"])
    if bits is None:
        raise _wrong(text, BITS, part)
    if match["activation_bits"] not in (None, "8"):
        raise _wrong(text, f"activations have 8 bits: w{bits}a8{match['static']}", part)
    if group is not None and int(group) < 1:
        raise _wrong(text, f"a group has at least 1 input: w{bits}g64", part)
    return {
        "bits": bits,
        "activation_bits": match["activation_bits"] and 8,
        "static_activations": match["static"] == "s",
        "group": group and int(group),
        "symmetric": bits in ALWAYS_SYMMETRIC or match["symmetric"] == "s",
    }


def _bits(digits: str) -> float | None:
    """1 to 8, an int, or `TERNARY_BITS`; None for any other number."""
    bits = Decimal(digits)
    if bits == Decimal(str(TERNARY_BITS)):
        return TERNARY_BITS
    return int(bits) if bits % 1 == 0 and 1 <= bits <= 8 else None


def _method(text: str, part: str, step: str, method: str | None) -> str | None:
    if method is None or method in METHODS[step]:
        return method
    known = ", ".join(METHODS[step])
    reason = f"known for {step}: {known}" if known else f"{step} takes no method"
    raise _wrong(text, f'unknown method "{method}"; {reason}', part)


def _unknown(text: str, part: str) -> str:
    nearest = difflib.get_close_matches(part.strip().lower(), _SPELLINGS, n=2, cutoff=0.4)
    form = _FORMS.get(part[:1].lower(), "")
    told = [f"the step is spelled {form}"] if form else []
    told += [f"nearest: {', '.join(nearest)}"] if nearest else []
    known = f"an option is one of {', '.join(NAMES)}, op:NAME, kNvM, or steps {ORDER} joined by +"
    if text != part and (part in NAMES or names_cache(part)):
        return f'"{part}" stands alone and takes no steps'
    return f'"{part}" is no option; {"; ".join(told) or known}'


def _wrong(text: str, reason: str, part: str | None = None) -> InvalidInput:
    where = "" if part is None or part == text else f'"{part}": '
    return InvalidInput(f'option "{text}": {where}{reason}')
