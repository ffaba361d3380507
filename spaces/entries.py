"""Spaces of a study file: for each site the options of the first entry that names it."""

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase

from apportion.errors import InvalidInput
from apportion.spaces.choice import OPERATION
from apportion.spaces.compressors.compose import refusal
from apportion.spaces.grammar import Option, parse_option
from apportion.spaces.parts import treated_site, treatment_refusal
from apportion.spaces.sites import Site
from apportion.spaces.space import DENSE, DROP, KEEP, Space
from apportion.spaces.unrealized import unrealized
from apportion.spaces.views import not_written_back

KINDS = (
    "keep, drop and drop:mean are for blocks and sub-blocks, cP% for those of them whose width can "
    "change, vP% for attention whose values can, qP% where queries and keys can (apportion sites), "
    "op:NAME for choice blocks, kNvM for caches, all others for weights"
)


@dataclass(frozen=True)
class Entry:
    """One `[[space]]` entry of a study file: patterns of sites and the options they get.

    `skip_unfit` leaves an option out where it does not fit instead of refusing the file.
    """

    sites: tuple[str, ...]
    options: tuple[str, ...]
    skip_unfit: bool = False


def site_matches(site: Site, pattern: str) -> bool:
    """Whether a pattern names a site: by its name, a member's name, or `kind:name`."""
    names = [site.name, *(member.path for member in site.members)]
    if site.cache is not None and site.parent is not None:
        names.append(site.parent)
    if ":" in pattern:
        kind, _, pattern = pattern.partition(":")
        if kind != site.kind:
            return False
    return any(fnmatchcase(name, pattern) for name in names)


def build_space(
    sites: Sequence[Site],
    entries: Sequence[Entry],
    rank_multiple: int = 8,
    called: str = "space",
) -> Space:
    """The space of a study file: for each site the options of the first entry that matches.

    A pattern that names a structure site gives its weight options to every weight site below it.
    Sites without a choice are left out: they stay dense. Messages call the entries `called`.

    Raises:
        InvalidInput: unknown or unfit options, patterns that match nothing; one problem a line.
    """
    problems: list[str] = []
    chosen_sites: list[Site] = []
    chosen_options: list[tuple[Option, ...]] = []
    parsed = _parse_entries(entries, problems, called)
    matched: dict[tuple[int, str], list[Site]] = {}
    unfit: dict[tuple[int, str], list[str]] = {}
    for site in sites:
        found = _entry_of(site, sites, entries, parsed, matched)
        if found is None:
            continue
        options = [option for option in parsed[found] if _is_for(site, option)]
        fitting = []
        for option in options:
            reason = _reason(site, option, rank_multiple)
            if reason is None:
                fitting.append(option)
            elif not entries[found].skip_unfit:
                unfit.setdefault((found, str(option)), []).append(reason)
        neutral = parse_option(_neutral(site))
        first = [neutral, *(o for o in fitting if str(o) == DROP)]
        chosen_sites.append(site)
        chosen_options.append((*first, *(o for o in fitting if o not in first)))
    for (entry, text), reasons in unfit.items():
        count = f"{len(reasons)} site" + ("s" if len(reasons) > 1 else "")
        place = f"{called}[{entry + 1}].options"
        problems.append(f'{place}: "{text}" does not fit {count}: {reasons[0]}')
    problems += _unmatched(sites, entries, matched, called)
    problems += _untaken(entries, parsed, matched, called)
    if problems:
        raise InvalidInput("\n".join(problems))
    return Space(tuple(chosen_sites), tuple(chosen_options))


def _parse_entries(
    entries: Sequence[Entry], problems: list[str], called: str
) -> list[list[Option]]:
    parsed: list[list[Option]] = []
    for number, entry in enumerate(entries, 1):
        options: list[Option] = []
        for text in entry.options:
            try:
                option = parse_option(text)
            except InvalidInput as error:
                problems.append(f"{called}[{number}].options: {error}")
                continue
            reason = unrealized(option)
            if reason is not None:
                problems.append(f'{called}[{number}].options: "{text}": {reason}')
            elif option not in options:
                options.append(option)
        parsed.append(options)
    return parsed


def _entry_of(
    site: Site,
    sites: Sequence[Site],
    entries: Sequence[Entry],
    parsed: Sequence[Sequence[Option]],
    matched: dict[tuple[int, str], list[Site]],
) -> int | None:
    """The first entry with an option for this kind of site one of whose patterns names it.

    Args:
        matched: takes the site for each (entry, pattern) that names it.
    """
    decided: int | None = None
    around = [s for s in sites if s.is_structure and _lies_in(site, s)]
    for number, entry in enumerate(entries):
        fits = any(_is_for(site, option) for option in parsed[number])
        for pattern in entry.sites:
            everything = pattern.rpartition(":")[2] == "*"
            direct = site_matches(site, pattern) and not (site.optional and everything)
            below = not site.is_structure and any(site_matches(s, pattern) for s in around)
            # An entry of wrong options only has been told of; its patterns may be right.
            if (direct or below) and (fits or not parsed[number]):
                matched.setdefault((number, pattern), []).append(site)
                if fits and decided is None:
                    decided = number
    return decided


def _lies_in(site: Site, structure: Site) -> bool:
    return bool(site.members) and site.members[0].path.startswith(structure.name + ".")


def _neutral(site: Site) -> str:
    if site.choices:
        return OPERATION + site.choices[0]
    return KEEP if site.is_structure else DENSE


def _is_for(site: Site, option: Option) -> bool:
    """Whether the option is of the site's kind."""
    if site.choices or option.operation is not None:
        return bool(site.choices) and option.operation is not None
    if site.cache is not None or option.cache_bits is not None:
        return site.cache is not None and option.cache_bits is not None
    if option.value_percent is not None:
        return site.values is not None
    if option.query_key_percent is not None:
        return site.query_keys is not None
    if option.narrows:
        return site.width is not None
    return option.is_structure == site.is_structure


def _reason(site: Site, option: Option, rank_multiple: int) -> str | None:
    if site.choices:
        return _unknown_alternative(site, option)
    if (width := treated_site(site, option).width) is not None:
        return treatment_refusal(option, width, rank_multiple)
    if site.written_back and (reason := not_written_back(option, site.unseen)):
        return reason
    found = (refusal(option, member.shape, rank_multiple) for member in site.members)
    return next((reason for reason in found if reason is not None), None)


def _unknown_alternative(site: Site, option: Option) -> str | None:
    if option.operation in site.choices:
        return None
    near = get_close_matches(str(option.operation), site.choices, n=1)
    hint = f"; nearest: {OPERATION}{near[0]}" if near else ""
    return f"{site.name} has {', '.join(OPERATION + name for name in site.choices)}{hint}"


def _unmatched(
    sites: Sequence[Site],
    entries: Sequence[Entry],
    matched: Container[tuple[int, str]],
    called: str,
) -> list[str]:
    names = [n for s in sites for n in (s.name, f"{s.kind}:{s.name}")]
    kinds = sorted({f"{s.kind}:*" for s in sites})
    candidates = sorted({_generalized(name) for name in names}) + kinds
    problems = []
    for number, entry in enumerate(entries):
        for pattern in entry.sites:
            if (number, pattern) in matched or entry.skip_unfit:
                continue
            place = f'{called}[{number + 1}].sites: "{pattern}"'
            if any(site_matches(s, pattern) for s in sites):
                problems.append(f"{place} names only sites that no option here is for; {KINDS}")
                continue
            near = get_close_matches(pattern, candidates, n=1, cutoff=0.5)
            hint = ""
            if near:
                count = sum(site_matches(s, near[0]) for s in sites)
                hint = f'; nearest: "{near[0]}" ({count} site{"s" if count != 1 else ""})'
            problems.append(f"{place} matches no site{hint}")
    return problems


def _untaken(
    entries: Sequence[Entry],
    parsed: Sequence[Sequence[Option]],
    matched: Mapping[tuple[int, str], Sequence[Site]],
    called: str,
) -> list[str]:
    """Options that none of the sites which their entry names can take."""
    problems = []
    for number, entry in enumerate(entries):
        named = [s for pattern in entry.sites for s in matched.get((number, pattern), ())]
        for option in parsed[number]:
            neutral = str(option) in (DENSE, KEEP)
            if neutral or not named or entry.skip_unfit or any(_is_for(s, option) for s in named):
                continue
            problems.append(
                f'{called}[{number + 1}].options: "{option}" is for none of the sites that the '
                f"entry names; {KINDS}"
            )
    return problems


def _generalized(name: str) -> str:
    """A pattern that a user would write for this name: "*.self_attn.*" or "*.mlp"."""
    kind, colon, path = name.rpartition(":")
    parts = path.split(".")
    numbered = [place for place, part in enumerate(parts) if part.isdigit()]
    if not numbered:
        return name
    rest = parts[numbered[-1] + 1 :]
    if not rest:
        return f"{kind}{colon}*"
    return f"{kind}{colon}*.{rest[0]}.*" if len(rest) > 1 else f"{kind}{colon}*.{rest[0]}"
