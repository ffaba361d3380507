"""How two specifications differ."""

from typing import Any

from apportion.studies.specification.study_spec import StudySpec
from apportion.studies.specification.words import shown, written


def difference(old: StudySpec, new: StudySpec) -> list[str]:
    """A line for each key that differs: `limits.bits: "3.5" -> "4"`."""
    before, after = _leaves(old.to_json()), _leaves(new.to_json())
    return [
        f"{place}: {before.get(place, 'not given')} -> {after.get(place, 'not given')}"
        for place in dict.fromkeys([*before, *after])
        if before.get(place) != after.get(place)
    ]


def _leaves(value: Any, place: tuple[int | str, ...] = ()) -> dict[str, str]:
    """Written place -> shown value, lists of plain values as one."""
    if isinstance(value, dict):
        children = list(value.items())
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        children = list(enumerate(value))
    else:
        listed = isinstance(value, list)
        text = f"[{', '.join(shown(item) for item in value)}]" if listed else shown(value)
        return {written(place): text}
    leaves: dict[str, str] = {}
    for key, child in children:
        leaves |= _leaves(child, (*place, key))
    return leaves
