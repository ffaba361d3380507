"""A start configuration in a file, of EvoPress or of ours: what it holds tells what it is."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from apportion.errors import InvalidInput
from apportion.spaces.sites import Site
from apportion.spaces.space import DENSE, DROP, KEEP, Configuration, Space
from apportion.studies.evopress.drops import PARTS, drops_to_configuration, parse_drops
from apportion.studies.evopress.levels import parse_levels
from apportion.studies.evopress.space_levels import space_levels_to_configuration
from apportion.studies.evopress.text import content

FORMS = (
    "a level or drop configuration of EvoPress, apportion.json or report.json of an exported "
    'folder, what "apportion show NAME --json" prints, or JSON {"SITE": "OPTION"}'
)


def read_start(file: Path, space: Space, sites: Sequence[Site]) -> Configuration:
    """The configuration in a file: site -> option; sites that it leaves out stay as they are.

    Args:
        file: of any of `FORMS`.
        space: the study's.
        sites: the model's, in the space or not.

    Raises:
        InvalidInput: the file cannot be read, is of no such form, or holds what the space does
            not; names the file, and the line, site or layer.
    """
    text = content(file)
    first = text.partition("\n")[0].strip()
    try:
        if first.startswith("{"):
            found = _of_json(text, space, sites)
        elif first in PARTS:
            found = _of_drops(text, space, sites)
        elif ":" in first:
            levels = parse_levels(text, "the levels")
            found = space_levels_to_configuration(levels, space, sites)
        else:
            raise InvalidInput(f"is no configuration; right would be {FORMS}")
        space.config(found)
    except InvalidInput as error:
        raise InvalidInput(f"{file}: {error}") from error
    return found


def _of_drops(text: str, space: Space, sites: Sequence[Site]) -> Configuration:
    drops = parse_drops(text, "the drops")
    droppable = [s for s, texts in zip(space.sites, space.texts, strict=True) if DROP in texts]
    whole = {"none", "attn+mlp"}.issuperset(drops.words)
    if whole and all(site.kind == "block" for site in droppable):
        # Nothing below a block can be dropped: the block stands for both of its parts.
        sites = [site for site in sites if site.kind == "block"]
    return drops_to_configuration(drops, sites)


def _of_json(text: str, space: Space, sites: Sequence[Site]) -> Configuration:
    """Without the sites of the model that the space does not hold, where they stay as they are."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise InvalidInput(f"is no JSON: line {error.lineno}: {error.msg}") from error
    found = _configuration_in(value)
    if not found or not all(isinstance(option, str) for option in found.values()):
        raise InvalidInput(f"holds no configuration; right would be {FORMS}")
    outside = {site.name for site in sites} - set(space.names)
    return {
        name: option
        for name, option in found.items()
        if not (name in outside and option in (DENSE, KEEP))
    }


def _configuration_in(value: Any) -> dict[str, Any]:
    """Of a report that of the winner; {} where there is none."""
    if isinstance(value, dict) and isinstance(points := value.get("front"), list):
        value = next(
            (p for p in points if isinstance(p, dict) and p.get("number") == value.get("winner")),
            None,
        )
    for key in ("point", "configuration"):
        value = value.get(key, value) if isinstance(value, dict) else None
    return value if isinstance(value, dict) else {}
