"""Sizes and times as people write them. 1 GB is 10^9 bytes."""

import re

from apportion.errors import InvalidInput

BYTES = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
MILLISECONDS = {"us": 1e-3, "ms": 1.0, "s": 1e3}
QUANTITY = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?)\s*([A-Za-z]+)\s*")


def _parse(text: str, units: dict[str, float] | dict[str, int], example: str) -> float:
    match = QUANTITY.fullmatch(text)
    if match is None or match[2] not in units:
        known = ", ".join(units)
        raise InvalidInput(f'"{text}" is no quantity; write for example "{example}" ({known})')
    return float(match[1]) * units[match[2]]


def parse_bytes(text: str) -> float:
    """ "1.1 GB" -> 1.1e9. Raises InvalidInput."""
    return _parse(text, BYTES, "1.1 GB")


def parse_milliseconds(text: str) -> float:
    """ "900 ms" -> 900.0. Raises InvalidInput."""
    return _parse(text, MILLISECONDS, "900 ms")


def format_bytes(size_bytes: float) -> str:
    """2100000 -> "2.1 MB"."""
    for unit in ("TB", "GB", "MB", "KB"):
        if size_bytes >= BYTES[unit]:
            return f"{size_bytes / BYTES[unit]:.3g} {unit}"
    return f"{size_bytes:.0f} B"
