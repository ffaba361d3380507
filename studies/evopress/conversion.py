"""Level configurations as configurations of a model's weight sites, and the other way round.

What has no counterpart on the other side is refused.
"""

from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches

from apportion.errors import InvalidInput
from apportion.spaces.sites import Member, Site
from apportion.spaces.space import DENSE, Configuration
from apportion.studies.evopress.levels import LevelConfig, LevelLine, level_line
from apportion.studies.evopress.scales import Scale


def levels_to_configuration(
    config: LevelConfig, sites: Iterable[Site], scale: Scale
) -> Configuration:
    """Weight site -> option, for the sites whose members the level configuration names.

    EvoPress leaves a module that it does not name dense, so such a site is left out here too:
    `Space.canonical` makes it `dense`.

    Raises:
        InvalidInput: a module is no member of a site, a site is named in part, its members
            disagree, or a level is no option.
    """
    levels = config.levels
    site_of = {member.path: site for site in sites for member in site.members}
    for module in levels:
        if module not in site_of:
            near = get_close_matches(module, site_of, n=1)
            hint = f'; nearest: "{near[0]}"' if near else ""
            raise InvalidInput(f'"{module}" has a level, but no site holds it{hint}')
    named = {site_of[module].name: site_of[module] for module in levels}
    return {name: _shared_option(site, levels, scale) for name, site in named.items()}


def _shared_option(site: Site, levels: Mapping[str, str], scale: Scale) -> str:
    missing = [member.path for member in site.members if member.path not in levels]
    if missing:
        raise InvalidInput(
            f"{site.name} is one choice, but {', '.join(missing)} has no level; name every member"
        )
    options = {m.path: _option(m, levels[m.path], scale) for m in site.members}
    if len(set(options.values())) > 1:
        told = ", ".join(f"{name} at {levels[name]} ({o})" for name, o in options.items())
        raise InvalidInput(
            f"{site.name} is one choice, but its members differ: {told}; give all the same option"
        )
    return next(iter(options.values()))


def _option(member: Member, level: str, scale: Scale) -> str:
    options = scale.options(member)
    if level not in options:
        known = ", ".join(options)
        raise InvalidInput(f"{member.path}: level {level} is no option; levels: {known}")
    return options[level]


def configuration_to_levels(
    configuration: Mapping[str, str], sites: Iterable[Site], scale: Scale
) -> LevelConfig:
    """One line for each member of a site that has a level, in the order of the sites.

    A dense site gets no line where dense is no level, and so does all that lies under a dropped
    site, which a canonical configuration holds as dense: EvoPress leaves both as they are.

    Args:
        configuration: site -> option; those of structure sites are not looked at.
        sites: the model's.
        scale: what the levels mean.

    Raises:
        InvalidInput: a site is unknown, an option is no level of a member, or no site has a level.
    """
    sites = list(sites)
    unknown = set(configuration) - {site.name for site in sites}
    if unknown:
        raise InvalidInput(f'no site "{min(unknown)}" in this model')
    lines = tuple(
        line for site in sites for line in _lines(site, configuration.get(site.name, DENSE), scale)
    )
    if not lines:
        raise InvalidInput("no site has a level: the level configuration would be empty")
    return LevelConfig(lines)


def _lines(site: Site, option: str, scale: Scale) -> Iterator[LevelLine]:
    for member in site.members:
        level_of = {text: level for level, text in scale.options(member).items()}
        if option in level_of:
            yield level_line(member.path, level_of[option])
        elif option != DENSE:
            known = ", ".join(level_of)
            raise InvalidInput(
                f'{site.name}: "{option}" is no level of {member.path}; its levels: {known}'
            )
