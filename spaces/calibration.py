"""One pass over calibration data: what every compressor needs to know of a layer's inputs."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from apportion.errors import InvalidInput
from apportion.spaces.batches import Batch, call
from apportion.spaces.compressors.compose import InputStatistics
from apportion.spaces.sites import Member, Site

Sums = dict[str, InputStatistics]
SLICE = 256


def _rows(layer_input: Tensor, member: Member) -> Tensor | None:
    """A layer's input as rows `[n, in]`; a grouped convolution has no single matrix of inputs."""
    conv = member.shape.conv
    if conv is None:
        return layer_input.reshape(-1, layer_input.shape[-1])
    if conv.groups != 1:
        return None
    patches = F.unfold(
        layer_input.float(), conv.kernel, conv.dilation, conv.padding, conv.stride
    )  # [batch, in, positions]
    return patches.transpose(1, 2).reshape(-1, patches.shape[1])


def _accumulate(site: Site, sums: Sums) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    member = site.members[0]
    width = member.shape.in_features

    def add(module: nn.Module, args: tuple[Any, ...]) -> None:
        rows = _rows(args[0], member)
        if rows is None:
            return
        rows = rows.float()
        if site.name not in sums:
            zeros = torch.zeros(width, width, dtype=torch.float64)
            sums[site.name] = InputStatistics(zeros, 0)
        seen = sums[site.name]
        product = rows.T @ rows
        # Adding float32 to float64 makes a float64 copy: of a slice, it is small.
        for first in range(0, width, SLICE):
            seen.second_moment[first : first + SLICE] += product[first : first + SLICE]
        seen.tokens += rows.shape[0]

    return add


@contextmanager
def watched(model: nn.Module, sites: Iterable[Site]) -> Iterator[Sums]:
    """Sum what enters the weight sites among `sites`, in every pass that is made meanwhile.

    What enters a matrix that is written back cannot be seen from outside of its module.

    Gives, for each site that was reached, the float64 sum `[in, in]` of its float32 products.

    Raises:
        InvalidInput: at the end, inputs that are not finite.
    """
    sums: Sums = {}
    handles = [
        model.get_submodule(site.members[0].module).register_forward_pre_hook(
            _accumulate(site, sums)
        )
        for site in sites
        if not site.is_structure and not site.written_back
    ]
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()
    for name, statistics in sums.items():
        if not bool(torch.isfinite(statistics.second_moment).all()):
            raise InvalidInput(f"data.calibration: the inputs of site {name} are not finite")


@torch.no_grad()
def collect(
    model: nn.Module,
    sites: Iterable[Site],
    batches: Iterable[Batch],
    progress: Callable[[int], None] = lambda done: None,
) -> Sums:
    """Second moments of each weight site's input, all at once, summed in float64.

    Args:
        model: the dense model.
        sites: the weight sites among them are watched; members of a group share one input.
        batches: calibration data.
        progress: told how many batches are done.

    Raises:
        InvalidInput: no data, or inputs that are not finite.
    """
    done = 0
    with watched(model, sites) as sums:
        for done, batch in enumerate(batches, 1):
            call(model, batch)
            progress(done)
    if done == 0:
        raise InvalidInput("data.calibration: there is no calibration data")
    return sums
