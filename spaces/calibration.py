"""One pass over calibration data: what every compressor needs to know of a layer's inputs."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from apportion.errors import InvalidInput
from apportion.spaces.batches import Batch, call
from apportion.spaces.compressors.compose import InputStatistics
from apportion.spaces.sites import Member, Site
from apportion.spaces.space import Space


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


def _accumulate(
    site: Site, sums: dict[str, InputStatistics]
) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    member = site.members[0]
    width = member.shape.in_features

    def add(module: nn.Module, args: tuple[Any, ...]) -> None:
        rows = _rows(args[0], member)
        if rows is None:
            return
        rows = rows.float()
        seen = sums.setdefault(
            site.name, InputStatistics(torch.zeros(width, width, dtype=torch.float64), 0)
        )
        seen.second_moment += (rows.T @ rows).double()
        seen.tokens += rows.shape[0]

    return add


@torch.no_grad()
def collect(
    model: nn.Module,
    space: Space,
    batches: Iterable[Batch],
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, InputStatistics]:
    """Second moments of each weight site's input, summed in float64.

    Args:
        model: the dense model.
        space: its weight sites are watched; members of a group share one input.
        batches: calibration data.
        progress: told how many batches are done.

    Raises:
        InvalidInput: no data, or inputs that are not finite.
    """
    sums: dict[str, InputStatistics] = {}
    handles = [
        model.get_submodule(site.members[0].module).register_forward_pre_hook(
            _accumulate(site, sums)
        )
        for site in space.sites
        if not site.is_structure
    ]
    done = 0
    try:
        for done, batch in enumerate(batches, 1):
            call(model, batch)
            progress(done)
    finally:
        for handle in handles:
            handle.remove()
    if done == 0:
        raise InvalidInput("data.calibration: there is no calibration data")
    for name, statistics in sums.items():
        if not bool(torch.isfinite(statistics.second_moment).all()):
            raise InvalidInput(f"data.calibration: the inputs of site {name} are not finite")
    return sums
