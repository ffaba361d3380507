"""OWL's allocation as a baseline: a sparsity for each block, by its share of outliers."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from decimal import Decimal

from apportion.errors import InvalidInput
from apportion.search.problem import Config
from apportion.spaces.grammar import Option, parse_option
from apportion.spaces.outlier_ratios import block_of, block_sparsities
from apportion.spaces.sites import Site
from apportion.spaces.space import Space
from apportion.studies.specification.sections import OWL

DIGITS = 9  # of a percentage; what lies behind is rounding


def check_levels(space: Space) -> None:
    """Refuse a space in which no weight site has two options that differ in P of `sP%` alone.

    Raises:
        InvalidInput: names what would be right.
    """
    for place in space.weight_sites:
        levels = Counter(_but_sparsity(o) for o in space.options[place] if _is_level(o))
        if max(levels.values(), default=0) > 1:
            return
    raise InvalidInput(
        f'"{OWL}" gives each block a sparsity of its own, but no site of this space has two '
        "options that differ in P of sP% alone; offer some, such as s40%, s50% and s60%"
    )


def owl_configurations(
    space: Space,
    uniform: Mapping[str, Config],
    outliers: Mapping[str, float],
    blocks: Sequence[Site],
) -> dict[str, Config]:
    """Option `sP%...` -> its uniform configuration with OWL's sparsities; those that differ.

    Each site that has the option takes, among those that differ from it in P alone, the nearest to
    what its block shall lose; of two as near, the one that removes less. Sites in no block of
    `outliers` stay as they are.

    Args:
        uniform: option -> that option everywhere.
        outliers: block -> share of its weights that are outliers.
        blocks: the model's.
    """
    found = {}
    for text, config in uniform.items():
        if _is_level(parse_option(text)):
            owl = _allocated(space, text, config, outliers, blocks)
            if owl != config:
                found[text] = owl
    return found


def _allocated(
    space: Space,
    text: str,
    config: Config,
    outliers: Mapping[str, float],
    blocks: Sequence[Site],
) -> Config:
    option, block_at, weights = parse_option(text), dict[int, str](), Counter[str]()
    for place in space.weight_sites:
        block = block_of(space.sites[place], blocks)
        if block is not None and block in outliers and space.texts[place][config[place]] == text:
            block_at[place] = block
            weights[block] += space.sites[place].weights
    if not weights:
        return config
    wanted = block_sparsities(
        _percent(option) / 100, {block: outliers[block] for block in weights}, weights
    )
    chosen = list(config)
    for place, block in block_at.items():
        near = [
            (round(abs(_percent(other) - 100 * wanted[block]), DIGITS), _percent(other), number)
            for number, other in enumerate(space.options[place])
            if _is_level(other) and _but_sparsity(other) == _but_sparsity(option)
        ]
        chosen[place] = min(near)[2]
    return tuple(chosen)


def _is_level(option: Option) -> bool:
    """Whether it removes P % of a layer's weights."""
    return isinstance(option.sparsity, Decimal) and not option.narrows


def _percent(option: Option) -> float:
    """P of `sP%`."""
    return float(option.sparsity) if isinstance(option.sparsity, Decimal) else 0.0


def _but_sparsity(option: Option) -> Option:
    return replace(option, sparsity=None)
