"""One entry of the bank made: a site's weights under an option."""

from torch import nn

from apportion.spaces.apply import member_weight
from apportion.spaces.compressors.compose import realize
from apportion.spaces.compressors.treatment import realize_treatment
from apportion.spaces.grammar import Option
from apportion.spaces.sites import Site
from apportion.spaces.statistics import StatisticsFiles
from apportion.spaces.stored import StoredSite


def realize_site(
    model: nn.Module,
    site: Site,
    option: Option,
    statistics: StatisticsFiles,
    model_dtype: str,
    rank_multiple: int,
) -> StoredSite:
    """What the bank stores of a site under an option.

    Args:
        model: the dense model.
        site: a weight site of it, or a sub-block with a width.
        option: what to do.
        statistics: of the site's inputs; of a sub-block those of its groups, by their names.
        model_dtype: dtype of what the option leaves as it is.
        rank_multiple: ranks of rP% are multiples of it.

    Raises:
        InvalidInput: the option is refused, or weights or statistics are not finite.
        OSError, SafetensorError: the statistics are not there or damaged.
    """
    weights = [member_weight(model, m).float() for group in site.groups for m in group]
    if site.width is not None and option.keep_percent is not None:
        found = [statistics.of(name) for name in site.input_names]
        return realize_treatment(weights, site.width, option, found, model_dtype, rank_multiple)
    seen = statistics.of(site.name)
    stored = (
        realize(weight, member.shape, option, seen, model_dtype, rank_multiple)
        for weight, member in zip(weights, site.members, strict=True)
    )
    return StoredSite(tuple(stored))
