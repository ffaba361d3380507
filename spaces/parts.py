"""What a site launches under an option: the layers that share an input, and how each is stored."""

from dataclasses import dataclass, replace

from apportion.kernels.formats import Format, LayerShape
from apportion.spaces.compressors.compose import RANK_MULTIPLE, format_of, refusal
from apportion.spaces.compressors.query_keys import kept_query_keys, query_key_refusal
from apportion.spaces.compressors.restructure import kept_units, unit_refusal, width_refusal
from apportion.spaces.compressors.values import kept_values, value_refusal
from apportion.spaces.folding import Norm
from apportion.spaces.grammar import Option
from apportion.spaces.sites import Member, Site, Width
from apportion.spaces.views import not_written_back

UNSEEN = "what follows c of experts is done without statistics"


@dataclass(frozen=True)
class Part:
    """Layers that share an input and run as one operator.

    Attributes:
        members: the dense weights that they stand for.
        shapes: of what is stored; narrower than the members' under `cP%`, `vP%`, `qP%`.
        formats: how each is stored.
    """

    members: tuple[Member, ...]
    shapes: tuple[LayerShape, ...]
    formats: tuple[Format, ...]


def treated_site(site: Site, option: Option) -> Site:
    """The site with what the option leaves less of as its width: under `vP%` value dimensions,
    under `qP%` query-key dimensions."""
    if option.dimension_percent is None:
        return site
    fewer = site.query_keys if option.value_percent is None else site.values
    return replace(site, width=fewer)


def folded_norm(site: Site, option: Option) -> Norm | None:
    """What takes in the scales of a site's inputs under an option; None: the site, if it has any.

    A treatment's layers keep theirs, because the norm is around its sub-block.
    """
    return site.norm if option.scales_inputs else None


def part_shapes(
    site: Site, option: Option, rank_multiple: int = RANK_MULTIPLE
) -> tuple[tuple[LayerShape, ...], ...]:
    """Shapes of what is stored, for each of `left_groups`."""
    width = treated_site(site, option).width
    if width is None or not option.narrows:
        return tuple(tuple(member.shape for member in group) for group in site.groups)
    kept = _kept(width, option, rank_multiple)
    return tuple(tuple(cut.narrowed(kept) for cut in group) for group in width.left(kept))


def parts(
    site: Site, option: Option, model_dtype: str, rank_multiple: int = RANK_MULTIPLE
) -> tuple[Part, ...]:
    """What a weight site, or a treated sub-block, launches.

    Raises:
        InvalidInput: the option is refused.
    """
    left = option.rest if option.narrows else option
    folds = folded_norm(site, option) is not None

    def format(shape: LayerShape) -> Format:
        found = format_of(left, shape, model_dtype, rank_multiple)
        return replace(found, input_scaled=False) if folds else found

    return tuple(
        Part(members, shapes, tuple(map(format, shapes)))
        for members, shapes in zip(
            left_groups(site, option), part_shapes(site, option, rank_multiple), strict=True
        )
    )


def left_groups(site: Site, option: Option) -> tuple[tuple[Member, ...], ...]:
    """Those of `site.groups` that are left under an option: all, or those of so many experts."""
    if site.width is None or option.keep_percent is None:
        return site.groups
    kept = kept_units(option.keep_percent, site.width.units)
    return tuple(tuple(cut.member for cut in group) for group in site.width.left(kept))


def first_units(
    site: Site, option: Option, rank_multiple: int = RANK_MULTIPLE
) -> tuple[int, ...] | None:
    """As many units as a treatment keeps, the first ones (of each head); None under any other."""
    width = treated_site(site, option).width
    if width is None or not option.narrows:
        return None
    size, kept = width.units // width.heads, _kept(width, option, rank_multiple) // width.heads
    return tuple(head * size + unit for head in range(width.heads) for unit in range(kept))


def _kept(width: Width, option: Option, rank_multiple: int) -> int:
    """How many units of a treated site's width stay."""
    if option.value_percent is not None:
        return kept_values(option.value_percent, width.units, rank_multiple)
    if option.query_key_percent is not None:
        return kept_query_keys(option.query_key_percent, width, rank_multiple) * width.heads
    if option.keep_percent is not None:
        return kept_units(option.keep_percent, width.units)
    return width.units


def kept_share(site: Site, option: Option) -> float:
    """The share of a sub-block's heads, channels or experts that stay under an option."""
    if site.width is None or option.keep_percent is None:
        return 1.0
    return kept_units(option.keep_percent, site.width.units) / site.width.units


def treatment_refusal(option: Option, width: Width, rank_multiple: int) -> str | None:
    """Why a sub-block cannot have `cP%`, `vP%` or `qP%` with what is composed; None if it can.

    Args:
        option: of the sub-block.
        width: of its `treated_site`.
        rank_multiple: ranks and dimensions of heads are multiples of it.
    """
    if not option.narrows:
        return None
    if option.query_key_percent is not None:
        reason = query_key_refusal(option.query_key_percent, width, rank_multiple)
    elif option.keep_percent is None:
        reason = value_refusal(option, width, rank_multiple)
    else:
        reason = width_refusal(option.keep_percent, width) or unit_refusal(option, width)
    if reason is not None:
        return reason
    if width.experts is not None and (reason := not_written_back(option.rest, UNSEEN)):
        return reason
    kept = _kept(width, option, rank_multiple)
    cuts = (cut for group in width.left(kept) for cut in group)
    found = (refusal(option.rest, cut.narrowed(kept), rank_multiple) for cut in cuts)
    return next((reason for reason in found if reason is not None), None)
