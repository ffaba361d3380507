"""The configurations that a study starts from: read when it is submitted, and kept with it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from apportion.errors import InvalidInput
from apportion.hashing import file_hash
from apportion.search.problem import Config
from apportion.studies.context import Context, Output
from apportion.studies.owl import check_levels, owl_configurations
from apportion.studies.pricing import Prices
from apportion.studies.specification import StudySpec
from apportion.studies.specification.sections import OWL
from apportion.studies.start_files import read_start
from apportion.workers.spec import Setting

FILE = "start"
STARTS = (f"{FILE}:", f"{OWL}:")
"""What the origins of their trials begin with."""
Start = dict[str, Any]
"""JSON: `origin` of its trial, `file`, its `hash`, and the `configuration`, site -> option."""


def read_starts(spec: StudySpec, setting: Setting) -> list[Start]:
    """What the files that a study starts from hold, in their order.

    Raises:
        InvalidInput: a line for each file that is none, or that the space does not hold; or there
            are no levels of sparsity for OWL.
    """
    files = [Path(name) for name in spec.search.start if name != OWL]
    starts, problems = list[Start](), list[str]()
    if len(files) < len(spec.search.start):
        try:
            check_levels(setting.space)
        except InvalidInput as error:
            problems.append(f"search.start: {error}")
    for file in files:
        try:
            configuration = read_start(file, setting.space, setting.sites)
        except InvalidInput as error:
            problems.append(f"search.start: {error}")
            continue
        name = _name(file, files)
        starts.append(
            {
                "origin": f"{FILE}:{name}",
                "file": str(file),
                "hash": file_hash(file),
                "configuration": configuration,
            }
        )
    if problems:
        raise InvalidInput("\n".join(problems))
    return starts


def _name(file: Path, files: Sequence[Path]) -> str:
    """The file's name without its ending, with the folder's where two are called alike."""
    alike = [other for other in files if other.stem == file.stem and other != file]
    return f"{file.parent.name}/{file.stem}" if alike else file.stem


def changed_file(starts: Sequence[Start]) -> str | None:
    """The first file that no longer says what is kept of it; one that is gone says nothing."""
    for start in starts:
        file = Path(start["file"])
        if file.is_file() and file_hash(file) != start["hash"]:
            return str(file)
    return None


def without_starts(
    struck: Mapping[str, Sequence[str]], starts: Sequence[Start]
) -> dict[str, list[str]]:
    """Site -> options to be struck, less those that a start configuration holds."""
    held = {pair for start in starts for pair in start["configuration"].items()}
    left = {name: [o for o in options if (name, o) not in held] for name, options in struck.items()}
    return {name: options for name, options in left.items() if options}


def start_configurations(
    context: Context, prices: Prices, starts: Sequence[Start], compressed: Output
) -> tuple[tuple[str, Config], ...]:
    """(origin, configuration) of all that the search begins with, in the order of the study file.

    Args:
        context: of the study.
        prices: with the space that is left after striking.
        starts: what the files hold.
        compressed: output of the stage `compress`, with the outlier ratios where OWL is asked for.
    """
    found, left = list[tuple[str, Config]](), iter(starts)
    for name in context.spec.search.start:
        if name != OWL:
            start = next(left)
            found.append((start["origin"], prices.space.config(start["configuration"])))
            continue
        owl = owl_configurations(
            prices.space, prices.uniform, compressed["outliers"], context.setting.blocks
        )
        found += [(f"{OWL}:{option}", config) for option, config in owl.items()]
        if not owl:
            context.display.warning(
                "search.start: OWL's sparsities, rounded to those of the space, are the same in "
                "all blocks: it adds no configuration to the uniform ones"
            )
    return tuple(found)
