"""What levels of bits mean in a study's space: the option of so many bits that a site has."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from apportion.errors import InvalidInput
from apportion.spaces.sites import Member, Site
from apportion.spaces.space import DENSE, Configuration, Space
from apportion.studies.evopress.conversion import levels_to_configuration
from apportion.studies.evopress.levels import LevelConfig, level_line

DENSE_BITS = 16
"""Levels of so many bits and more leave a layer as it is."""


def space_levels_to_configuration(
    config: LevelConfig, space: Space, sites: Sequence[Site]
) -> Configuration:
    """Weight site -> option of the space, for the sites whose members the configuration names.

    A level of N bits (of the GGUF toolkit N and a fraction, which its scales take) is the first
    option of the site, in the order of the study file, that only stores weights at N bits.

    Args:
        config: levels of quantization.
        space: the study's.
        sites: the model's, in the space or not; those that are not have to stay dense.

    Raises:
        InvalidInput: like `levels_to_configuration`; or the levels are steps of sparsity.
    """
    outside = {m.path: s.name for s in sites for m in s.members if s.name not in space.names}
    bits = {level: _bits(module, level) for module, level in config.levels.items()}
    for module, level in config.levels.items():
        if module in outside and bits[level] < DENSE_BITS:
            raise InvalidInput(
                f"{module} has level {level}, but {outside[module]} is no site of this space and "
                "stays dense; name it in [[space]]"
            )
    inside = [level_line(m, level) for m, level in config.levels.items() if m not in outside]
    return levels_to_configuration(
        LevelConfig(tuple(inside)), space.sites, SpaceLevels(space, bits)
    )


@dataclass(frozen=True)
class SpaceLevels:
    """Levels of bits as options of a space's members.

    Attributes:
        space: the study's.
        bits: level -> bits of the codes, beside the whole numbers, which mean themselves.
    """

    space: Space
    bits: Mapping[str, int]

    def options(self, member: Member) -> Mapping[str, str]:
        """Level -> option of the member's site; levels without one are left out."""
        of_bits = self._of_bits[member.path]
        known = {**{str(bits): bits for bits in of_bits}, **self.bits}
        capped = {level: min(bits, DENSE_BITS) for level, bits in known.items()}
        return {level: of_bits[bits] for level, bits in capped.items() if bits in of_bits}

    @cached_property
    def _of_bits(self) -> dict[str, dict[int, str]]:
        """Member -> bits -> option."""
        found: dict[str, dict[int, str]] = {}
        for site, options in zip(self.space.sites, self.space.options, strict=True):
            of_bits = {DENSE_BITS: DENSE}
            for option in options:
                bits = option.bits
                if option.steps == ("w",) and isinstance(bits, int) and not option.activation_bits:
                    of_bits.setdefault(bits, str(option))
            found |= {member.path: of_bits for member in site.members}
        return found


def _bits(module: str, level: str) -> int:
    """The bits of the codes: 3 of "3", 2 of "2.5625-Q2_K". Raises InvalidInput."""
    whole = level.partition(".")[0].partition("-")[0]
    if not whole.isdecimal() or int(whole) == 0:
        raise InvalidInput(
            f"{module} has level {level}, a step of sparsity, which only its database explains "
            "(docs/evopress.md); levels here are bits, such as 4"
        )
    return int(whole)
