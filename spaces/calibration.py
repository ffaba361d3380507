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


def _is_seen(site: Site) -> bool:
    """Whether what enters it can be watched, and is one matrix of inputs: not in groups."""
    if site.is_structure or site.written_back:
        return False
    conv = site.members[0].shape.conv
    return conv is None or conv.groups == 1


def _rows(layer_input: Tensor, member: Member) -> Tensor:
    """A layer's input as rows `[n, in]`."""
    conv = member.shape.conv
    if conv is None:
        return layer_input.reshape(-1, layer_input.shape[-1])
    patches = F.unfold(
        layer_input.float(), conv.kernel, conv.dilation, conv.padding, conv.stride
    )  # [batch, in, positions]
    return patches.transpose(1, 2).reshape(-1, patches.shape[1])


def _accumulate(
    member: Member, seen: InputStatistics
) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    width = member.shape.in_features

    def add(module: nn.Module, args: tuple[Any, ...]) -> None:
        rows = _rows(args[0], member).float()
        product = rows.T @ rows
        # Adding float32 to float64 makes a float64 copy: of a slice, it is small.
        for first in range(0, width, SLICE):
            seen.second_moment[first : first + SLICE] += product[first : first + SLICE]
        seen.tokens += rows.shape[0]

    return add


def _nothing(inputs: int) -> InputStatistics:
    return InputStatistics(torch.zeros(inputs, inputs, dtype=torch.float64), 0)


@contextmanager
def watched(model: nn.Module, sites: Iterable[Site]) -> Iterator[Sums]:
    """Sum what enters the weight sites among `sites`, in every pass that is made meanwhile.

    What enters a matrix that is written back cannot be seen from outside of its module, and what
    enters a grouped convolution is no single matrix.

    Gives, for each of the others, the float64 sum `[in, in]` of its float32 products: zeros where
    no token came by.

    Raises:
        InvalidInput: at the end, inputs that are not finite.
    """
    seen = [site for site in sites if _is_seen(site)]
    sums = {site.name: _nothing(site.members[0].shape.in_features) for site in seen}
    handles = [
        model.get_submodule(site.members[0].module).register_forward_pre_hook(
            _accumulate(site.members[0], sums[site.name])
        )
        for site in seen
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
