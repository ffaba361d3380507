"""Bytes of keys and values that a cache holds for one token of context."""

from collections.abc import Sequence

from torch import nn

from apportion.cost_models.operators import model_dtype
from apportion.cost_models.static import StaticCost
from apportion.cost_models.table import padded
from apportion.kernels.formats import DTYPES
from apportion.kernels.packed_cache import CacheFormat
from apportion.spaces.grammar import Option
from apportion.spaces.parts import kept_share
from apportion.spaces.sites import Cached, Site
from apportion.spaces.space import Space


def has_caches(space: Space) -> bool:
    """Whether a space holds a cache: only then is there such a cost."""
    return any(site.cache is not None for site in space.sites)


def cache_bytes(model: nn.Module, space: Space, sites: Sequence[Site]) -> StaticCost:
    """Bytes for one token of one sequence: all layers, scales included.

    Keys of the last tokens, fewer than a group, are stored unrounded; they count as the others.
    A cache that is no site of the space is part of the `keep` of what is around it, or of the base;
    attention with fewer heads has as many fewer of its cache.

    Args:
        model: the dense model.
        space: what can be chosen.
        sites: all of the model, those of caches included.
    """
    dtype = model_dtype(model)
    rows = [[0.0] * len(options) for options in space.options]
    base = 0.0
    for site in sites:
        if (cached := site.cache) is None:
            continue
        dense = _dense_bytes(cached, dtype)
        around = [p for p, other in enumerate(space.sites) if _is_around(other, site)]
        if site.name in space.names:
            place = space.names[site.name]
            rows[place] = [_option_bytes(cached, o, dense) for o in space.options[place]]
        elif around:
            rows[max(around, key=lambda p: len(space.sites[p].name))][0] += dense
        else:
            base += dense
        for place in around:
            for number, option in enumerate(space.options[place]):
                if option.narrows:
                    rows[place][number] += dense * _share(space.sites[place], option)
    return StaticCost(padded(rows), base)


def _is_around(structure: Site, cache: Site) -> bool:
    return structure.is_structure and cache.name.startswith(structure.name + ".")


def _dense_bytes(cached: Cached, dtype: str) -> float:
    channels = cached.heads * (cached.key_channels + cached.value_channels)
    return float(channels * DTYPES[dtype].itemsize)


def _option_bytes(cached: Cached, option: Option, dense: float) -> float:
    if option.cache_bits is None:
        return dense
    format = CacheFormat(*option.cache_bits)
    return format.bytes_per_token(cached.heads, cached.key_channels, cached.value_channels)


def _share(site: Site, option: Option) -> float:
    """Of attention's cache that a treatment leaves: `vP%` fills values up with zeros again."""
    is_heads = site.width is not None and site.width.unit == "head"
    return kept_share(site, option) if is_heads else 1.0
