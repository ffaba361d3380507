"""Limits: what a configuration may cost, as written in a study file."""

import difflib
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from apportion.errors import InvalidInput
from apportion.spaces.grammar import parse_option
from apportion.units import format_bytes, parse_bytes, parse_milliseconds

CACHE_BYTES = "cache_bytes"
PLAIN_KINDS = ("weight_bytes", "resident_bytes", "bits", CACHE_BYTES)
WORST = "latency.worst"
EXAMPLES = {"weight_bytes": "1.1 GB", "resident_bytes": "1.5 GB", "bits": "3.5"}
EXAMPLES |= {CACHE_BYTES: "20 KB"}
LATENCY_EXAMPLE = "900 ms"
NUMBER = r"[0-9]+(?:\.[0-9]+)?"
RELATIVE = re.compile(rf"\s*({NUMBER})\s*x\s+(\S+)\s*")
ALMOST_RELATIVE = re.compile(rf"\s*({NUMBER})\s*[x%]?\s*")


@dataclass(frozen=True)
class Limit:
    """An upper bound on one kind of cost: absolute, or relative to a uniform configuration.

    Attributes:
        kind: "weight_bytes", "resident_bytes", "bits", "cache_bytes", "latency.DEVICE" or
            "latency.worst".
        value: bytes, bits per weight or milliseconds; None where the limit is relative.
        factor: of the cost of the uniform configuration `unit`; None where it is absolute.
        unit: canonical option text ("dense", "w4g64"); None where the limit is absolute.
    """

    kind: str
    value: float | None = None
    factor: float | None = None
    unit: str | None = None


def parse_limit(kind: str, text: str | float) -> Limit:
    """The limit that `text` spells: "1.1 GB", "900 ms", "3.5" (bits), "0.5x dense", "1x w4g64".

    Raises:
        InvalidInput: what is wrong with it, and an example of what would be right.
    """
    text = str(text)
    relative = RELATIVE.fullmatch(text)
    if relative is None:
        limit = Limit(kind, value=_absolute(kind, text))
    else:
        limit = Limit(kind, factor=float(relative[1]), unit=_unit(kind, text, relative[2]))
    if limit.value == 0 or limit.factor == 0:
        raise InvalidInput(f'limits.{kind}: "{text}" must be above zero')
    return limit


def limit_problems(limits: Mapping[str, object], devices: Collection[str]) -> list[str]:
    """Everything that is wrong with the limits of a study file, a line each."""
    problems = []
    if not limits:
        problems.append(
            'limits: at least one is needed, for example weight_bytes = "0.5x dense" under [limits]'
        )
    for kind, text in limits.items():
        problem = _kind_problem(kind, devices) or _text_problem(kind, text)
        if problem is not None:
            problems.append(f"limits.{kind}: {problem}")
            continue
        try:
            parse_limit(kind, str(text))
        except InvalidInput as error:
            problems.append(str(error))
    return problems


def amount(kind: str, value: float) -> str:
    """A value of a kind as people write it: "941 MB", "3.5 bits", "12.3 ms"."""
    if kind == "bits":
        return f"{value:.4g} bits"
    return f"{value:.4g} ms" if kind.startswith("latency.") else format_bytes(value)


def _kind_problem(kind: str, devices: Collection[str]) -> str | None:
    if kind in PLAIN_KINDS or kind == WORST:
        return None
    word, _, device = kind.partition(".")
    if word == "latency" and not device:
        return f'name the device: latency.{min(devices, default="here")} = "0.5x dense"'
    if word == "latency":
        if device in devices:
            return None
        near = difflib.get_close_matches(device, [*devices, "worst"], n=1)
        hint = f'did you mean "{near[0]}"?' if near else f"devices: {', '.join(devices)}"
        return f'no device "{device}"; {hint}'
    known = [*PLAIN_KINDS, *(f"latency.{name}" for name in devices), WORST]
    near = difflib.get_close_matches(kind, known, n=1)
    hint = f'did you mean "{near[0]}"?' if near else f"known: {', '.join(known)}"
    return f"nothing by that name can be limited; {hint}"


def _text_problem(kind: str, text: object) -> str | None:
    if isinstance(text, str) or (kind == "bits" and type(text) in (int, float)):
        return None
    example = EXAMPLES.get(kind, LATENCY_EXAMPLE)
    return f'write a quantity with its unit in quotes, "{example}" or "0.5x dense", got {text}'


def _absolute(kind: str, text: str) -> float:
    """Bytes, milliseconds or bits per weight."""
    almost = ALMOST_RELATIVE.fullmatch(text)
    if almost is not None and kind != "bits" and not text.strip().replace(".", "").isdigit():
        raise InvalidInput(f'limits.{kind}: "{text}" of what? write for example "0.5x dense"')
    if kind == WORST:
        raise InvalidInput(
            f'limits.{kind}: "{text}" is no share of the dense latency; write "0.5x dense"'
        )
    if kind == "bits":
        if re.fullmatch(rf"\s*{NUMBER}\s*", text) is None:
            raise InvalidInput(
                f'limits.bits: "{text}" is no number of bits; write "3.5" or "1x w4g64"'
            )
        return float(text)
    try:
        return parse_milliseconds(text) if kind.startswith("latency.") else parse_bytes(text)
    except InvalidInput as error:
        raise InvalidInput(f'limits.{kind}: {error}, or "0.5x dense"') from error


def _unit(kind: str, text: str, unit: str) -> str:
    try:
        option = parse_option(unit)
    except InvalidInput as error:
        raise InvalidInput(f"limits.{kind}: {error}") from error
    if option.is_structure and not (option.narrows or option.cache_bits):
        raise InvalidInput(
            f'limits.{kind}: "{text}": a unit is one weight option for all sites, '
            "such as dense or w4g64"
        )
    return str(option)
