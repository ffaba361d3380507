"""What a site launches under an option: the layers that share an input, and how each is stored."""

from dataclasses import dataclass

from apportion.kernels.formats import Format, LayerShape
from apportion.spaces.compressors.compose import RANK_MULTIPLE, format_of, refusal
from apportion.spaces.compressors.restructure import kept_units, unit_refusal, width_refusal
from apportion.spaces.grammar import Option
from apportion.spaces.sites import Member, Site, Width
from apportion.spaces.views import not_written_back

UNSEEN = "what follows c of experts is done without statistics"


@dataclass(frozen=True)
class Part:
    """Layers that share an input and run as one operator.

    Attributes:
        members: the dense weights that they stand for.
        shapes: of what is stored; narrower than the members' under `cP%`.
        formats: how each is stored.
    """

    members: tuple[Member, ...]
    shapes: tuple[LayerShape, ...]
    formats: tuple[Format, ...]


def part_shapes(site: Site, option: Option) -> tuple[tuple[LayerShape, ...], ...]:
    """Shapes of what is stored, for each of `left_groups`."""
    if site.width is None or option.keep_percent is None:
        return tuple(tuple(member.shape for member in group) for group in site.groups)
    kept = kept_units(option.keep_percent, site.width.units)
    return tuple(tuple(cut.narrowed(kept) for cut in group) for group in site.width.left(kept))


def parts(
    site: Site, option: Option, model_dtype: str, rank_multiple: int = RANK_MULTIPLE
) -> tuple[Part, ...]:
    """What a weight site, or a treated sub-block, launches.

    Raises:
        InvalidInput: the option is refused.
    """
    left = option.rest if option.narrows else option
    return tuple(
        Part(
            members,
            shapes,
            tuple(format_of(left, shape, model_dtype, rank_multiple) for shape in shapes),
        )
        for members, shapes in zip(
            left_groups(site, option), part_shapes(site, option), strict=True
        )
    )


def left_groups(site: Site, option: Option) -> tuple[tuple[Member, ...], ...]:
    """Those of `site.groups` that are left under an option: all, or those of so many experts."""
    if site.width is None or option.keep_percent is None:
        return site.groups
    kept = kept_units(option.keep_percent, site.width.units)
    return tuple(tuple(cut.member for cut in group) for group in site.width.left(kept))


def first_units(site: Site, option: Option) -> tuple[int, ...] | None:
    """As many units as a treatment keeps, the first ones; None under any other option."""
    if site.width is None or option.keep_percent is None:
        return None
    return tuple(range(kept_units(option.keep_percent, site.width.units)))


def kept_share(width: Width, option: Option) -> float:
    """The share of a width's units that stay under an option."""
    if option.keep_percent is None:
        return 1.0
    return kept_units(option.keep_percent, width.units) / width.units


def treatment_refusal(option: Option, width: Width, rank_multiple: int) -> str | None:
    """Why a sub-block cannot have `cP%` and what is composed with it; None if it can."""
    if option.keep_percent is None:
        return None
    if reason := width_refusal(option.keep_percent, width) or unit_refusal(option, width):
        return reason
    if width.experts is not None and (reason := not_written_back(option.rest, UNSEEN)):
        return reason
    kept = kept_units(option.keep_percent, width.units)
    cuts = (cut for group in width.left(kept) for cut in group)
    found = (refusal(option.rest, cut.narrowed(kept), rank_multiple) for cut in cuts)
    return next((reason for reason in found if reason is not None), None)
