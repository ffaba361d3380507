"""What a super-net's training chooses among: choice blocks, and the sites that it makes elastic."""

from collections.abc import Callable, Mapping, Sequence

from torch import nn

from apportion.errors import InvalidInput
from apportion.spaces.batches import Batch
from apportion.spaces.choice import find_choices
from apportion.spaces.discovery import Discovery, discover
from apportion.spaces.entries import Entry, build_space, site_matches
from apportion.spaces.grammar import Option, parse_option
from apportion.spaces.sites import Site
from apportion.spaces.space import DROP, KEEP, Space

Elastic = Mapping[str, Sequence[str]]
"""Pattern of structure sites, as in a study file -> the options that share their weights."""


def trained_space(model: nn.Module, elastic: Elastic, sample: Callable[[], Batch]) -> Space:
    """All that a super-net's training chooses among, in the order of a study's sites.

    Every choice block that can be a site, with all its alternatives; and each site that `elastic`
    names, with `keep` and the options of the first pattern that names it.

    Args:
        model: the model, in evaluation mode.
        elastic: options `keep`, `drop` and `cP%:first`.
        sample: gives a batch to find structure sites by; not asked where none is named.

    Raises:
        InvalidInput: an unknown or unfit option, a pattern that matches nothing, a width that
            cannot change; or nothing is left to choose.
    """
    untreated: dict[str, str] = {}
    sites = [Site(p, "choice", choices=c.names) for p, c in find_choices(model, untreated)]
    options = {site.name: tuple(Option(operation=n) for n in site.choices) for site in sites}
    if elastic:
        found = discover(model, sample())
        options |= _elastic_options(elastic, found)
        sites = [site for site in found.sites if site.name in options]
    if all(len(row) < 2 for row in options.values()):
        told = "".join(f"; {path or 'the model'}: {why}" for path, why in untreated.items())
        raise InvalidInput(
            "the model has no apportion.Choice that a study can decide, and elastic gives no site "
            f"a second option{told}"
        )
    return Space(tuple(sites), tuple(options[site.name] for site in sites))


def _elastic_options(elastic: Elastic, found: Discovery) -> dict[str, tuple[Option, ...]]:
    """Name of each elastic site -> its options."""
    for pattern, texts in elastic.items():
        narrows = [_trainable(pattern, text).narrows for text in texts]
        if any(narrows):
            _refuse_fixed(pattern, found)
    entries = [Entry((pattern,), tuple(texts)) for pattern, texts in elastic.items()]
    space = build_space(found.sites, entries, called="elastic")
    return dict(zip(space.names, space.options, strict=True))


def _trainable(pattern: str, text: str) -> Option:
    """The option that a text spells, one whose weights are shared."""
    try:
        option = parse_option(text)
    except InvalidInput as error:
        raise InvalidInput(f'elastic["{pattern}"]: {error}') from error
    if str(option) in (KEEP, DROP):
        return option
    if option.steps == ("c",) and option.methods == (("c", "first"),):
        return option
    fitting = f"; here c{option.keep_percent}%:first" if option.keep_percent else ""
    raise InvalidInput(
        f'elastic["{pattern}"]: "{text}" does not share the weights that are trained; '
        f"{KEEP}, {DROP} and cP%:first do{fitting}"
    )


def _refuse_fixed(pattern: str, found: Discovery) -> None:
    """Tell of a pattern that asks for widths and names only sites whose width cannot change."""
    named = [s for s in found.sites if s.name in found.fixed_widths and site_matches(s, pattern)]
    if named and not any(s.width for s in found.sites if site_matches(s, pattern)):
        name = named[0].name
        raise InvalidInput(
            f'elastic["{pattern}"]: the width of {name} cannot change: {found.fixed_widths[name]}'
        )
