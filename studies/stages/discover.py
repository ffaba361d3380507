"""Discover: the model's sites, their options, and the data, as the study will hold them to."""

from collections import Counter

from apportion.errors import InvalidInput
from apportion.spaces.parts import folded_norm
from apportion.spaces.space import Space
from apportion.studies.context import Context, Output
from apportion.studies.starts import changed_file, read_starts
from apportion.workers.samples import PARTS, check_disjoint

AGAIN = "submit it under another name, what is still valid is reused"


class Changed(InvalidInput):
    """Something is not what it was when the study began; put back, the study goes on."""


def run(context: Context) -> Output:
    """The stage's output: what must be the same when the study is resumed.

    Raises:
        InvalidInput: parts of the data share documents, no site has a choice, or a start
            configuration is not of the space.
    """
    samples = {part: context.samples(part) for part in PARTS}
    check_disjoint(samples)
    space = context.setting.space
    check_choices(space)
    for found in samples.values():
        if found.note:
            context.display.warning(found.note)
    starts = read_starts(context.spec, context.setting)
    return {
        "model": {"source": context.opened.source, "revision": context.opened.revision},
        "data": {part: found.hash for part, found in samples.items()},
        "windows": {part: found.windows for part, found in samples.items()},
        "objective": context.setting.objective.hash,
        "numerics": context.numerics,
        "space": _texts(space),
        **({"start": starts} if starts else {}),
        **({"norms": norms} if (norms := _norms(space)) else {}),
    }


def check_choices(space: Space) -> None:
    """Refuse a space without any choice; one of nothing but drops is one. Raises InvalidInput."""
    if all(len(options) < 2 for options in space.options):
        raise InvalidInput("space: no site of the model has a choice")


def summary(space: Space) -> str:
    """ "42 sites: 24 weight sites (42 linear layers), 12 sub-blocks, 6 blocks · 13 options"."""
    names = {"block": "block", "choice": "choice block", "cache": "cache"}
    kinds = Counter(names.get(s.kind, "sub-block") for s in space.sites if s.is_structure)
    layers = sum(len(site.members) for site in space.sites)
    parts = [f"{len(space.weight_sites)} weight sites ({layers} layers)"]
    parts += [
        f"{kinds[kind]} {kind}s"
        for kind in ("sub-block", "block", "choice block", "cache")
        if kinds[kind]
    ]
    options = len({text for row in space.texts for text in row})
    return f"{len(space.sites)} sites: {', '.join(parts)} · {options} options"


def check_unchanged(context: Context, output: Output) -> None:
    """Refuse to resume on another model, other data, code or another machine.

    Raises:
        Changed: says what.
    """
    before, now = output["model"]["revision"], context.opened.revision
    if before != now:
        raise Changed(
            f"refused: the model behind {output['model']['source']} has changed since the study "
            f"began ({before[:8]}... -> {now[:8]}...); {AGAIN}"
        )
    for part in PARTS:
        if output["data"][part] != context.samples(part).hash:
            raise Changed(f"refused: the {part} data have changed; {AGAIN}")
    if output["objective"] != context.setting.objective.hash:
        raise Changed(f"refused: the code of the loss has changed; {AGAIN}")
    if output["numerics"] != context.numerics:
        raise Changed(
            "refused: evaluations would be run otherwise than before "
            f"({output['numerics']} -> {context.numerics}); {AGAIN}"
        )
    if output["space"] != _texts(context.setting.space):
        raise Changed(f"refused: the model's sites or options are found differently; {AGAIN}")


def check_starts(output: Output) -> None:
    """Refuse to resume where a file of a start configuration says something else by now.

    What it said is kept, so it may be gone, and only a search needs it.

    Raises:
        Changed: names the file.
    """
    file = changed_file(output.get("start", ()))
    if file is not None:
        raise Changed(f"refused: search.start: {file} has changed since the study began; {AGAIN}")


def check_norms(context: Context, output: Output) -> None:
    """Refuse to resume where scales of awq would be stored elsewhere: its bytes are others.

    Raises:
        Changed: names a site.
    """
    before, now = output.get("norms", {}), _norms(context.setting.space)
    for site in sorted({*before, *now}):
        if before.get(site) != now.get(site):
            place = "a norm" if site in now else "the site"
            raise Changed(f"refused: the scales of awq at {site} are in {place} by now; {AGAIN}")


def _norms(space: Space) -> dict[str, str]:
    """Site -> the norm that takes in scales of its inputs under one of its options."""
    rows = zip(space.sites, space.options, strict=True)
    found = {s.name: [folded_norm(s, option) for option in row] for s, row in rows}
    return {name: norm.module for name, norms in found.items() for norm in norms if norm}


def _texts(space: Space) -> dict[str, list[str]]:
    return {s.name: list(t) for s, t in zip(space.sites, space.texts, strict=True)}
