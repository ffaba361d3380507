"""Outlier ratios of blocks, and how much each block is thinned by them.

OWL (Yin and others, "Outlier Weighed Layerwise Sparsity", ICML 2024, section 3): where more of a
block's weights are outliers by Wanda's score, making it sparse loses more; so it is made less so.
"""

from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor, nn

from apportion.spaces.apply import member_weight
from apportion.spaces.sites import Member, Site
from apportion.spaces.space import Space
from apportion.spaces.statistics import StatisticsFiles

OUTLIER = 5.0  # M: an outlier scores more than so many times its block's mean
SPREAD = 0.08  # lambda: the sparsities of two blocks differ by at most twice that


def outlier_ratios(
    model: nn.Module, space: Space, blocks: Sequence[Site], statistics: StatisticsFiles
) -> dict[str, float]:
    """Block -> the share of its weights that are outliers, between 0 and 1.

    Counted are the weights of the space's sites of whose inputs something is known; blocks without
    any are left out.
    """
    found: dict[str, list[tuple[str, Member]]] = {}
    for site in space.sites:
        block = block_of(site, blocks)
        if site.is_structure or block is None:
            continue
        for name, group in zip(site.input_names, site.groups, strict=True):
            seen = statistics.of(name)
            if seen is not None and seen.tokens:
                found.setdefault(block, []).extend((name, member) for member in group)
    return {block: _ratio(model, members, statistics) for block, members in found.items()}


def block_of(site: Site, blocks: Sequence[Site]) -> str | None:
    """The outermost block that a weight site lies in; None: it lies in none."""
    path = site.members[0].path if site.members else ""
    around = [block.name for block in blocks if path.startswith(block.name + ".")]
    return min(around, key=len, default=None)


def _ratio(
    model: nn.Module, members: Sequence[tuple[str, Member]], statistics: StatisticsFiles
) -> float:
    """Twice over the weights: a block's scores are not held at once."""
    weights = sum(member.shape.weights for _, member in members)
    total = sum(float(score.sum()) for score in _scores(model, members, statistics))
    above = OUTLIER * total / weights
    outliers = sum(int((score > above).sum()) for score in _scores(model, members, statistics))
    return outliers / weights


def _scores(
    model: nn.Module, members: Sequence[tuple[str, Member]], statistics: StatisticsFiles
) -> Iterator[Tensor]:
    """Of each member |w| * ||x||, float64 [out, in] (Wanda)."""
    for name, member in members:
        seen = statistics.of(name)
        if seen is not None:
            norms = seen.second_moment.diagonal().clamp_min(0).sqrt()
            yield member_weight(model, member).detach().abs().double() * norms


def block_sparsities(
    sparsity: float, outliers: Mapping[str, float], weights: Mapping[str, int]
) -> dict[str, float]:
    """Block -> the share of its weights to be removed; the more outliers, the less.

    The ratios are scaled linearly to a width of 2 lambda and shifted, as the authors' program does
    it, so that the mean is kept. The mean is over weights, of equal blocks that of the paper.

    Args:
        sparsity: the share to be removed of all.
        outliers: block -> its ratio.
        weights: block -> how many of its weights are made sparse.
    """
    low, high = min(outliers.values()), max(outliers.values())
    if low == high:
        return dict.fromkeys(outliers, sparsity)
    spared = {block: 2 * SPREAD * (ratio - low) / (high - low) for block, ratio in outliers.items()}
    mean = sum(spared[block] * weights[block] for block in spared) / sum(
        weights[block] for block in spared
    )
    return {block: sparsity + mean - spared[block] for block in spared}
