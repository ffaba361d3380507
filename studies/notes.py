"""What a report says beside its numbers: what got no credit, and what was done without data."""

from collections import Counter
from collections.abc import Iterable, Mapping

from apportion.spaces.space import Space
from apportion.studies.context import Output
from apportion.studies.stages.search import Candidate
from apportion.studies.starts import STARTS


def notes_of(space: Space, profiled: Output, compressed: Output) -> list[str]:
    """A line each.

    Args:
        space: without the options that were struck.
        profiled: the profile stage's output.
        compressed: the compress stage's output.
    """
    return [*_unreached(compressed), *_without_credit(space, profiled)]


def start_notes(candidates: Iterable[Candidate]) -> list[str]:
    """What came of each start configuration, a line each: not all are on the front."""
    return [
        f"{c.origin} is trial {c.number}: search loss {c.loss:.3g}"
        + ("" if c.feasible else ", outside of the limits")
        for c in candidates
        if c.origin.startswith(STARTS)
    ]


def _unreached(compressed: Output) -> list[str]:
    """That weights were compressed without statistics of their inputs."""
    names = compressed.get("unreached", ())
    if not names:
        return []
    weights = "1 weight" if len(names) == 1 else f"{len(names)} weights"
    return [
        f"no calibration data entered {weights}, {names[0]} for one: compressed by themselves, "
        "rounded to nearest"
    ]


def _without_credit(space: Space, profiled: Output) -> list[str]:
    """Options that run dense on a device, and options that were struck."""
    struck = _counts(profiled["struck"])
    offered = struck + Counter(text for texts in space.texts for text in texts)
    lines = []
    for name, found in profiled["profiles"].items():
        if counts := _counts(found["uncredited"]):
            told = _shares(counts, offered)
            lines.append(f"no latency credit on '{name}', runs dense: {told}")
    if struck:
        told = _shares(struck, offered)
        lines.append(f"struck, neither smaller nor faster than dense: {told}")
    return lines


def _counts(options: Mapping[str, list[str]]) -> Counter[str]:
    """Option -> at how many sites."""
    return Counter(text for texts in options.values() for text in texts)


def _shares(counts: Mapping[str, int], offered: Mapping[str, int]) -> str:
    """Options with how many of the sites that could have them, where it is not all of them."""
    return ", ".join(
        text if count == offered[text] else f"{text} ({count} of {offered[text]} sites)"
        for text, count in counts.items()
    )
