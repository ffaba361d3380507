"""The order of heads and channels: those of most weight first, for `cP%:first` keeps the first."""

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from apportion.errors import InvalidInput
from apportion.spaces.apply import member_weight
from apportion.spaces.batches import Batch
from apportion.spaces.compressors.importance import magnitude
from apportion.spaces.discovery import Discovery, discover
from apportion.spaces.entries import site_matches
from apportion.spaces.narrowing import unit_vectors, unit_weights
from apportion.spaces.sites import Width
from apportion.spaces.views import parameter_at


@torch.no_grad()
def sort_units(model: nn.Module, sample: Batch, sites: Sequence[str]) -> None:
    """Put the heads or channels of sub-blocks in the order of their magnitude, in place.

    What the model computes stays the same to rounding. Cai and others (2020, "Once-for-All",
    section 3.3) so prepare a trained network for elastic widths, by the L1 norms of channels; here
    it is the `magnitude` of `cP%`. To be done before `train_supernet`, not after it: the first
    units would be others than those that were trained to do without the rest.

    Args:
        model: a trained model.
        sample: what one call of it takes, to find its sites by.
        sites: patterns of blocks and sub-blocks, as in a study file.

    Raises:
        InvalidInput: a pattern names no site whose heads or channels can be put in order.
    """
    was_training = model.training
    found = discover(model.eval(), sample)
    model.train(was_training)
    widths = {name: width for p in sites for name, width in _sortable(found, p)}
    for width in widths.values():
        weights = [member_weight(model, cut.member).cpu() for cut in width.cuts]
        order = magnitude(width, weights).argsort(descending=True, stable=True).tolist()
        ordered = unit_weights(model, width, order) | unit_vectors(model, width, order)
        for path, values in ordered.items():
            parameter_at(model, path).copy_(values)


def _sortable(found: Discovery, pattern: str) -> Iterator[tuple[str, Width]]:
    """Name and width of the sites that a pattern names and that have heads or channels."""
    named = [site for site in found.sites if site_matches(site, pattern)]
    sortable = [(s.name, s.width) for s in named if s.width and s.width.experts is None]
    if not sortable:
        reasons = (f"; {s.name}: {why}" for s in named if (why := found.fixed_widths.get(s.name)))
        raise InvalidInput(
            f'sites: "{pattern}" names none whose heads or channels can be put in order'
            f"{next(reasons, '')}"
        )
    yield from sortable
