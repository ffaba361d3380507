"""What may be changed of a study's specification when it is resumed; each change is recorded.

Another limit or budget is another search: it begins a new round, in which everything that was
evaluated before is reused.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from apportion.errors import InvalidInput
from apportion.studies.database.rows import Change
from apportion.studies.specification import StudySpec

LIMITS, TOKENS, WORKERS = "limits", "tokens", "workers"
FACTOR = re.compile(r"[0-9.]+x")


def changed(spec: StudySpec, values: Mapping[str, Any]) -> StudySpec:
    """The specification with other limits or tokens.

    Raises:
        InvalidInput: what is changed would be refused in a study file, in the same words.
    """
    tables = spec.to_json()
    limits = dict(tables["limits"]) | dict(values.get(LIMITS, {}))
    tokens = values.get(TOKENS, tables["search"]["tokens"])
    return StudySpec(**tables | {"limits": limits, "search": tables["search"] | {"tokens": tokens}})


def completed(spec: StudySpec, limits: Mapping[str, str]) -> dict[str, str]:
    """The limits, "0.4x" alone being in the unit of the limit in force."""
    found = {}
    for kind, text in limits.items():
        before = str(spec.limits.get(kind, "")).split()
        of_before = len(before) == 2 and before[0].endswith("x") and FACTOR.fullmatch(text)
        found[kind] = f"{text} {before[1]}" if of_before else text
    return found


def in_force(spec: StudySpec, changes: Sequence[Change]) -> StudySpec:
    """The specification as submitted, with all that was changed since."""
    for change in changes:
        spec = changed(spec, change.values)
    return spec


def differing(spec: StudySpec, workers: int, values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the values that are not so already."""
    wanted = completed(spec, values.get(LIMITS, {}))
    limits = {kind: text for kind, text in wanted.items() if spec.limits.get(kind) != text}
    found: dict[str, Any] = {LIMITS: limits} if limits else {}
    if values.get(TOKENS) not in (None, spec.search.tokens):
        found[TOKENS] = values[TOKENS]
    if values.get(WORKERS) not in (None, workers):
        found[WORKERS] = values[WORKERS]
    return found


def changes_search(values: Mapping[str, Any]) -> bool:
    """Whether a change begins a new round: other workers find the same."""
    return LIMITS in values or TOKENS in values


def first_round(changes: Sequence[Change]) -> int:
    """The first round of the specification in force."""
    return max((c.first_round for c in changes if changes_search(c.values)), default=0)


def parse_limits(texts: Sequence[str]) -> dict[str, str]:
    """What follows `--limit`, "latency.here=0.4x". Raises InvalidInput."""
    limits = {}
    for text in texts:
        kind, equals, value = text.partition("=")
        if not (equals and kind.strip() and value.strip()):
            raise InvalidInput(f'--limit {text}: write "--limit latency.here=0.4x"')
        limits[kind.strip()] = value.strip()
    return limits


def told(change: Mapping[str, Any]) -> str:
    """A change in words: "limits.latency.here = 0.4x, search.tokens = 2,000,000"."""
    parts = [f"limits.{kind} = {value}" for kind, value in change.get(LIMITS, {}).items()]
    if TOKENS in change:
        parts.append(f"search.tokens = {change[TOKENS]:,}")
    if WORKERS in change:
        parts.append(f"{change[WORKERS]} workers")
    return ", ".join(parts)
