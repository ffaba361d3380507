"""How the matrices of an expert hold its channels, found by changing the channels' order."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from apportion.spaces.fewer import experts_of
from apportion.spaces.sites import Cut, Member, Width
from apportion.spaces.trials import TOLERANCE, NotRun, Run
from apportion.spaces.views import matrix_of, parameter_at


def channel_cuts(module: nn.Module, width: Width, dense: Tensor, run: Run) -> tuple[Cut, ...]:
    """How each matrix of the first expert holds its channels, proven by execution.

    An expert's channels are the inputs of one of its matrices and outputs of all others: one after
    the other, or in neighbouring rows (gate and up in turns). With the channels of all experts in
    another order the sub-block gives the same.

    Args:
        module: the sub-block.
        width: its width in experts, with paths below it.
        dense: what it gives.
        run: runs it.

    Returns:
        None where no order is known to be without effect, or experts have biases.
    """
    if _has_biases(module, width):
        return ()
    members = [cut.member for cut in width.groups[0]]
    for cuts, channels in _layouts(members):
        order = torch.randperm(channels, generator=torch.Generator().manual_seed(0)).tolist()
        weights = _reordered_weights(module, width, cuts, order)
        forward = lambda *args, w=weights, **kw: functional_call(module, w, args, kw)  # noqa: E731
        try:
            error = float((run(forward) - dense).norm())
        except NotRun:
            continue
        if error <= TOLERANCE * float(dense.norm()):
            return cuts
    return ()


def reordered(matrix: Tensor, cut: Cut, order: Sequence[int]) -> Tensor:
    """A matrix `[out, in]` of an expert with its channels in another order.

    Args:
        matrix: as `cut` says.
        cut: how it holds the channels.
        order: number of the channel that comes to each place.
    """
    places = torch.tensor(cut.places(order, len(order)))
    return matrix[:, places] if cut.side == "in" else matrix[places]


def _has_biases(module: nn.Module, width: Width) -> bool:
    """Whether experts hold anything but their matrices."""
    experts, weights = experts_of(width), {cut.member.parameter_path for cut in width.cuts}
    for path in experts.lists:
        names = module.get_submodule(f"{path}.0").state_dict()
        if any(f"{path}.0.{name}" not in weights for name in names):
            return True
    beside = set(experts.tensors) - set(experts.routers) - weights
    return any(parameter_at(module, path).ndim > 1 for path in beside)


def _layouts(members: Sequence[Member]) -> Iterator[tuple[tuple[Cut, ...], int]]:
    """All that could be, and how many channels there would be."""
    for consumer in reversed(range(len(members))):
        channels = members[consumer].shape.in_features
        makers = [m.shape.out_features for place, m in enumerate(members) if place != consumer]
        if not makers or channels < 2 or any(rows % channels for rows in makers):
            continue
        for in_turns in (False, True):
            yield (
                tuple(
                    Cut(member, "in")
                    if place == consumer
                    else _maker(member, member.shape.out_features // channels, in_turns)
                    for place, member in enumerate(members)
                ),
                channels,
            )


def _maker(member: Member, rows: int, in_turns: bool) -> Cut:
    return Cut(member, "out", rows, 1) if in_turns else Cut(member, "out", 1, rows)


def _reordered_weights(
    module: nn.Module, width: Width, cuts: Sequence[Cut], order: Sequence[int]
) -> dict[str, Tensor]:
    """Parameter path -> the weights of all experts with their channels in another order."""
    weights: dict[str, Tensor] = {}
    for expert in width.groups[: width.units]:
        for own, like in zip(expert, cuts, strict=True):
            path = own.member.parameter_path
            if path not in weights:
                weights[path] = parameter_at(module, path).detach().contiguous().clone()
            matrix = matrix_of(weights[path], own.member)
            matrix.copy_(reordered(matrix, like, order))
    return weights
