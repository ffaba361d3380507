"""A point of a front as EvoPress keeps it: dense weights by level, and what was chosen of them."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from apportion.errors import InvalidInput
from apportion.kernels.reference import reference_weight
from apportion.spaces.folding import folded_rate
from apportion.spaces.grammar import parse_option
from apportion.spaces.sites import Site
from apportion.spaces.space import DENSE, DROP, DROP_MEAN, Space
from apportion.spaces.stored import StoredSite
from apportion.spaces.views import parameter_at
from apportion.studies.evopress.conversion import configuration_to_levels
from apportion.studies.evopress.database import write_database
from apportion.studies.evopress.drops import configuration_to_drops
from apportion.studies.evopress.scales import BitLevels
from apportion.studies.stages.export import Chosen

# as EvoPress names them
LEVELS, DROPS = "final_configuration.txt", "layer_drop_config.txt"


def export(chosen: Chosen, folder: Path) -> None:
    """Write what was chosen into a new folder.

    `final_configuration.txt` holds the bits of each layer, `layer_drop_config.txt` what is dropped
    where something is, and `MODULE/BITS.pth` the dense weights [out, in] of every option that the
    point uses, of all sites that have it.

    Raises:
        InvalidInput: an option of the point is no number of bits, two have the same number, a
            drop is none that EvoPress knows or leaves a constant, another alternative than the
            first was chosen, or a cache is packed.
    """
    configuration = chosen.context.setting.space.canonical(chosen.point["configuration"])
    sites = chosen.context.setting.sites
    check_words(configuration, chosen.context.setting.space)
    options = [parse_option(text) for text in configuration.values()]
    used = {str(o) for o in options if o.narrows or not (o.is_structure or str(o) == DENSE)}
    scale = bit_levels(used)
    levels = configuration_to_levels(configuration, sites, scale)
    drops = None
    if DROP in configuration.values():
        drops = configuration_to_drops(configuration, sites)
    write_database(folder, _weights(chosen, scale))
    (folder / LEVELS).write_text(str(levels))
    if drops is not None:
        (folder / DROPS).write_text(str(drops))


def check_words(configuration: Mapping[str, str], space: Space) -> None:
    """Refuse what the formats have no word for: another alternative of a choice block than the
    first, which is the model's, packed caches, and a constant in place of what is dropped. Raises
    InvalidInput.
    """
    neutral = space.canonical({})
    for site in space.sites:
        chosen = configuration[site.name]
        is_other = (site.choices or site.cache) and chosen != neutral[site.name]
        if chosen == DROP_MEAN or is_other:
            raise InvalidInput(
                f'{site.name}: EvoPress has no level for "{configuration[site.name]}"; '
                "name another point with --trial, or export a folder of ours with --to"
            )


def bit_levels(options: Iterable[str]) -> BitLevels:
    """The levels of options that only quantize: whole bits. Raises InvalidInput for any other."""
    option_of: dict[str, str] = {}
    for text in sorted(options):
        option = parse_option(text)
        if option.steps != ("w",) or option.activation_bits or not isinstance(option.bits, int):
            raise InvalidInput(
                f'"{text}" is no level of EvoPress, whose levels are bits of the weights alone; '
                "name another point with --trial, or export a folder of ours with --to"
            )
        other = option_of.setdefault(str(option.bits), text)
        if other != text:
            raise InvalidInput(
                f'"{other}" and "{text}" are both level {option.bits}; a configuration of '
                "EvoPress has one kind of weights for each number of bits"
            )
    return BitLevels(option_of)


def _weights(chosen: Chosen, scale: BitLevels) -> Iterator[tuple[str, str, Tensor]]:
    space = chosen.space
    for site, options in zip(space.sites, space.options, strict=True):
        for level, text in scale.option_of.items():
            for option in (option for option in options if str(option) == text):
                stored = chosen.stored(site, option)
                rate = _rate(chosen.context.model, site, stored)
                for member, weight in zip(site.members, stored.weights, strict=True):
                    yield member.path, level, reference_weight(weight) * rate


def _rate(model: nn.Module, site: Site, stored: StoredSite) -> Tensor:
    """What a site's inputs are multiplied by in the norm before it, which EvoPress leaves dense."""
    if site.norm is None or not stored.norm:
        return torch.ones(())
    old = [parameter_at(model, path) for path in site.norm.paths]
    return folded_rate(old, stored.norm, site.norm.offset)
