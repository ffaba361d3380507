"""Costs that need no clock: bytes of the written file, bytes while running, bits per weight."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from apportion.cost_models.operators import model_dtype
from apportion.cost_models.profile import Profile
from apportion.cost_models.random_weights import nonzeros_of, random_weights
from apportion.cost_models.table import Rows, padded
from apportion.kernels.formats import DTYPES, stored_bytes
from apportion.kernels.group import resident_bytes
from apportion.kernels.registry import implementation
from apportion.spaces.choice import unchosen
from apportion.spaces.compressors.compose import RANK_MULTIPLE
from apportion.spaces.grammar import Option
from apportion.spaces.narrowing import unit_vectors
from apportion.spaces.padding import DENSE_DTYPES, served_by
from apportion.spaces.parts import first_units, folded_norm, part_shapes, parts, treated_site
from apportion.spaces.sites import Member, Site
from apportion.spaces.space import DENSE, DROP_MEAN, KEEP, Space


@dataclass(frozen=True)
class StaticCost:
    """A cost that adds up: `base` + the rows [sites, options] of all sites that are not void."""

    rows: Rows
    base: float


def weight_bytes(model: nn.Module, space: Space, rank_multiple: int = RANK_MULTIPLE) -> StaticCost:
    """Payload of all tensors written, tied ones once.

    A structure site's `keep` holds what lies in it and in no site below: norms and biases;
    `op:NAME` of a choice block holds its alternative.
    """
    dtype = model_dtype(model)
    rows = [
        [_site_bytes(site, option, dtype, rank_multiple) for option in options]
        for site, options in zip(space.sites, space.options, strict=True)
    ]
    base = _add_remainder(model, space, rows, dict(_written(model)), rank_multiple)
    return StaticCost(padded(rows), base)


def site_bytes(
    model: nn.Module, space: Space, rank_multiple: int = RANK_MULTIPLE
) -> list[dict[str, int]]:
    """For each site, option text -> stored bytes of its weights, or of its constant; 0 for drop.

    `keep` has the bytes of what only a treatment stores otherwise: of weights below it that are in
    no weight site.
    """
    dtype = model_dtype(model)
    found = [
        {str(o): int(_site_bytes(site, o, dtype, rank_multiple)) for o in options}
        for site, options in zip(space.sites, space.options, strict=True)
    ]
    for place, members in _only_treated(space).items():
        weights = sum(member.shape.weights for member in members)
        found[place][KEEP] += weights * DTYPES[dtype].itemsize
    return found


def bits(model: nn.Module, space: Space, rank_multiple: int = RANK_MULTIPLE) -> StaticCost:
    """8 x stored bytes of weight sites and treated sub-blocks / their number of dense weights."""
    # Choice blocks alone have none: no bits of nothing.
    weights = sum(site.weights for site in space.sites)
    weights += sum(m.shape.weights for members in _only_treated(space).values() for m in members)
    weights = weights or 1
    rows = [
        [8 * size / weights for size in row.values()]
        for row in site_bytes(model, space, rank_multiple)
    ]
    return StaticCost(padded(rows), 0.0)


def resident_cost(
    model: nn.Module,
    space: Space,
    implementations: Mapping[str, Mapping[str, str]],
    rank_multiple: int = RANK_MULTIPLE,
) -> StaticCost:
    """Bytes that the device holds while running: what the chosen operators keep of each weight.

    Each distinct operator is built once, with random weights, and asked. What is written back
    is held dense.
    """
    dtype = model_dtype(model)
    stored = random_weights(space, dtype, rank_multiple)
    held: dict[tuple[object, ...], float] = {}

    def size(site: Site, option: Option) -> float:
        if option.is_structure and not option.narrows:
            return _constant_bytes(site, option, dtype)
        if str(option) == DENSE or site.written_back or site.has_experts:
            shapes = (s for part in part_shapes(site, option, rank_multiple) for s in part)
            return float(sum(shape.weights for shape in shapes) * DTYPES[dtype].itemsize)
        given = implementations[site.name][str(option)]
        name = served_by(given)
        if given != name:  # as large as the dense layers
            width = DTYPES[DENSE_DTYPES[name]].itemsize
            return float(sum(m.shape.weights for group in site.groups for m in group) * width)
        folds = folded_norm(site, option) is not None
        key = (name, str(option), folds, part_shapes(site, option, rank_multiple))
        if key not in held:
            weights = iter(stored(site, option).weights)
            built = [
                implementation(name).build([next(weights) for _ in group], [None] * len(group))
                for group in site.groups
            ]
            held[key] = float(sum(map(resident_bytes, built)))
        return held[key]

    rows = [
        [size(site, option) for option in options]
        for site, options in zip(space.sites, space.options, strict=True)
    ]
    everything = {name: t for name, t in model.named_buffers()}
    tensors = dict(_written(model)) | _distinct(everything)
    base = _add_remainder(model, space, rows, tensors, rank_multiple)
    return StaticCost(padded(rows), base)


def struck(space: Space, weight: StaticCost, profiles: Sequence[Profile]) -> dict[str, list[str]]:
    """Site name -> options that are neither smaller nor faster than dense on any device.

    Faster is what is faster by its upper value: a draw is no gain. A treatment stands for all that
    lies in its sub-block.
    """
    tables = [profile.table for profile in profiles]
    bytes_of = _with_below(space, weight.rows)
    times_of = [_with_below(space, table.rows) for table in tables]
    found: dict[str, list[str]] = {}
    for place, options in enumerate(space.options):
        for number, option in enumerate(options[1:], 1):
            if option.is_structure and not option.narrows:
                continue
            smaller = weight.rows[place, number] < bytes_of[place]
            pairs = zip(tables, times_of, strict=True)
            faster = any(table.upper[place, number] < dense[place] for table, dense in pairs)
            if not smaller and not faster:
                found.setdefault(space.sites[place].name, []).append(str(option))
    return found


def _with_below(space: Space, rows: Rows) -> list[float]:
    """What each site costs as it is in the dense model, with all that lies below it."""
    costs = [float(row[0]) for row in rows]
    for place in reversed(range(len(costs))):  # parents stand before their children
        if space.parent[place] >= 0:
            costs[space.parent[place]] += costs[place]
    return costs


def _constant_bytes(site: Site, option: Option, dtype: str) -> float:
    """Of what `drop:mean` adds; 0 for what else says only what runs."""
    if str(option) != DROP_MEAN:
        return 0.0
    return float(math.prod(site.constant) * DTYPES[dtype].itemsize)


def _site_bytes(site: Site, option: Option, dtype: str, rank_multiple: int) -> float:
    if option.is_structure and not option.narrows:
        return _constant_bytes(site, option, dtype)
    if str(option) == DENSE:
        return float(site.weights * DTYPES[dtype].itemsize)
    return float(
        sum(
            stored_bytes(format, shape, nonzeros_of(option, shape))
            for part in parts(site, option, dtype, rank_multiple)
            for format, shape in zip(part.formats, part.shapes, strict=True)
        )
    )


def _only_treated(space: Space) -> dict[int, list[Member]]:
    """Place of a structure site -> weights that its treatments hold and no weight site does."""
    held = {_view(member) for site in space.sites for member in site.members}
    return {
        place: [m for group in site.groups for m in group if _view(m) not in held]
        for place, site in enumerate(space.sites)
        if any(option.narrows for option in space.options[place])
    }


def _view(member: Member) -> tuple[str, int | None]:
    return member.parameter_path, member.index


def _written(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What the written file holds of the dense model: the state, tied tensors once."""
    yield from _distinct(model.state_dict()).items()


def _distinct(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    seen: dict[tuple[int, torch.Size], str] = {}
    for name, tensor in tensors.items():
        place = (tensor.data_ptr() if tensor.numel() else id(tensor), tensor.shape)
        seen.setdefault(place, name)
    return {name: tensors[name] for name in seen.values()}


def _add_remainder(
    model: nn.Module,
    space: Space,
    rows: list[list[float]],
    tensors: Mapping[str, Tensor],
    rank_multiple: int,
) -> float:
    """Add all that no weight site holds to the `keep` around it, or to the alternatives that it is
    stored with; returns what nothing is around."""
    weights = {member.parameter_path for site in space.sites for member in site.members}
    base = 0.0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        around = [
            place
            for place, site in enumerate(space.sites)
            if site.is_structure and name.startswith(site.name + ".")
        ]
        if name not in weights and not around:
            base += size
        elif name not in weights:
            place = max(around, key=lambda place: len(space.sites[place].name))
            for number in _options_holding(space, place, name):
                rows[place][number] += size
        for place in around:
            for number, kept in _kept_sizes(model, space, place, name, size, rank_multiple):
                rows[place][number] += kept
    return base


def _kept_sizes(
    model: nn.Module, space: Space, place: int, name: str, size: int, rank_multiple: int
) -> Iterator[tuple[int, int]]:
    """(treatment, bytes of a tensor under it) of a structure site; weights are not among them."""
    site = space.sites[place]
    weights = {member.parameter_path for group in site.groups for member in group}
    for number, option in enumerate(space.options[place]):
        units = first_units(site, option, rank_multiple)
        width = treated_site(site, option).width
        if width is None or units is None or name in weights:
            continue
        narrow = unit_vectors(model, width, units).get(name)
        yield number, size if narrow is None else narrow.nbytes


def _options_holding(space: Space, place: int, name: str) -> list[int]:
    """The options of a structure site or choice block with which a tensor in it is stored."""
    site = space.sites[place]
    if not site.choices:
        return [0]
    return [
        number
        for number, text in enumerate(space.texts[place])
        if not name.startswith(unchosen(site.name, site.choices, text))
    ]
