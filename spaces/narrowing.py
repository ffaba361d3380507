"""A sub-block with fewer units: its layers are narrower, its interface is the same."""

import copy
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from apportion.kernels.formats import LayerShape
from apportion.kernels.reference import as_kernel
from apportion.spaces.fewer import expert_tensors, narrow_experts
from apportion.spaces.sites import Cut, Site, Width
from apportion.spaces.views import matrix_of, parameter_at, set_parameter


def shared_copy(module: nn.Module) -> nn.Module:
    """A copy whose layers can be replaced; parameters and buffers are those of the module."""
    tensors = itertools.chain(module.parameters(), module.buffers())
    return copy.deepcopy(module, {id(tensor): tensor for tensor in tensors})


@torch.no_grad()
def narrowed_copy(
    model: nn.Module, site: Site, kept: Sequence[int], biases: Sequence[Tensor | None] = ()
) -> nn.Module:
    """A copy of a sub-block with the dense weights of some of its units.

    What keeps its shape is shared with the model.

    Args:
        model: the model.
        site: a structure site of it.
        kept: numbers of the units that stay, ascending.
        biases: of each cut of its width, in place of those of the dense layers; empty: these.

    Raises:
        ValueError: the site has no width.
    """
    if site.width is None:
        raise ValueError(f"{site.name} has no width")
    narrowed = shared_copy(model.get_submodule(site.name))
    width = moved(site.width, site.name, "")
    narrow(narrowed, width, kept)
    if biases:
        for cut, bias in zip(width.cuts, biases, strict=True):
            if bias is not None:
                set_parameter(narrowed, f"{cut.member.module}.bias", bias)
    return narrowed


@torch.no_grad()
def narrow(module: nn.Module, width: Width, kept: Sequence[int]) -> None:
    """Leave units of a sub-block out, in place; tensors that it shares stay as they are.

    Args:
        module: the sub-block.
        width: its width, with paths below the sub-block.
        kept: numbers of the units that stay, ascending.
    """
    if width.experts is not None:
        narrow_experts(module, width, kept)
        return
    vectors = unit_vectors(module, width, kept)
    for path, weight in unit_weights(module, width, kept).items():
        set_parameter(module, path, weight)
    for cut in width.cuts:
        if cut.side != "whole":
            _set_sizes(module.get_submodule(cut.member.module), _sizes(cut.narrowed(len(kept))))
    put_vectors(module, vectors)


def unit_weights(model: nn.Module, width: Width, kept: Sequence[int]) -> dict[str, Tensor]:
    """The weights that become smaller with the units; gradients flow to the whole ones.

    Args:
        model: the model that the width's paths belong to.
        width: the width of one of its sub-blocks, not in experts.
        kept: numbers of the units that stay, in the order in which they will lie.

    Returns:
        Name in the model's state -> the rows or columns of the kept units, as the layer holds them.
    """
    found = {}
    for cut in width.cuts:
        if cut.side != "whole":
            path = cut.member.parameter_path
            matrix = matrix_of(parameter_at(model, path), cut.member)
            found[path] = _stored(part_of(matrix, cut, width, kept), cut)
    return found


def part_of(matrix: Tensor, cut: Cut, width: Width, kept: Sequence[int]) -> Tensor:
    """Rows or columns of a member's matrix `[out, in]` that belong to the kept units."""
    if cut.side == "whole":
        return matrix
    places = torch.tensor(cut.places(kept, width.units), device=matrix.device)
    return matrix.index_select(1 if cut.side == "in" else 0, places)


def unit_vectors(model: nn.Module, width: Width, kept: Sequence[int]) -> dict[str, Tensor]:
    """All but the weights that becomes shorter with the units: biases and the vectors of norms.

    Gradients flow to the whole vectors, but for what is of experts.

    Args:
        model: the model that the width's paths belong to.
        width: the width of one of its sub-blocks.
        kept: numbers of the units that stay, in the order in which they will lie.

    Returns:
        Name in the model's state -> the values of the kept units, `[kept * features]`; what is of
        experts like `expert_tensors`.
    """
    found = expert_tensors(model, width, kept)
    for cut in width.cuts:
        bias = getattr(model.get_submodule(cut.member.module), "bias", None)
        if cut.side in ("out", "groups") and isinstance(bias, Tensor):
            places = torch.tensor(cut.places(kept, width.units), device=bias.device)
            found[f"{cut.member.module}.bias"] = bias[places]
    for path in width.norms:
        module = model.get_submodule(path)
        own = (module.named_parameters(recurse=False), module.named_buffers(recurse=False))
        for name, vector in itertools.chain(*own):
            if vector.ndim == 1 and len(vector) % width.units == 0:
                by_unit = vector.view(width.units, -1)
                found[f"{path}.{name}"] = by_unit[list(kept)].flatten()
    return found


def put_vectors(module: nn.Module, vectors: Mapping[str, Tensor]) -> None:
    """Put `unit_vectors` in the place of biases, parameters and buffers of norms, in place."""
    for path, values in vectors.items():
        owner_path, _, name = path.rpartition(".")
        owner = module.get_submodule(owner_path)
        if isinstance(getattr(owner, name), nn.Parameter):
            set_parameter(module, path, values)
        else:
            setattr(owner, name, values)
        _set_sizes(owner, {"num_features": len(values), "num_parameters": len(values)})


def moved(width: Width, before: str, after: str) -> Width:
    """The same width of a like sub-block at another path.

    Args:
        width: the width.
        before: path of the sub-block that it is of; "": its paths begin below the sub-block.
        after: path of the other, in the same way.
    """

    def path(old: str) -> str:
        return f"{after}.{old.removeprefix(before).lstrip('.')}".strip(".")

    def cut(old: Cut) -> Cut:
        return replace(old, member=replace(old.member, module=path(old.member.module)))

    groups = tuple(tuple(cut(each) for each in group) for group in width.groups)
    norms, experts = tuple(map(path, width.norms)), width.experts
    if experts is not None:
        experts = replace(
            experts,
            routers=tuple(map(path, experts.routers)),
            tensors=tuple(map(path, experts.tensors)),
            lists=tuple(map(path, experts.lists)),
            channels=tuple(map(cut, experts.channels)),
        )
    return replace(width, groups=groups, norms=norms, experts=experts)


def _stored(matrix: Tensor, cut: Cut) -> Tensor:
    """A matrix `[out, in]` in the form in which the layer holds its weight."""
    stored = matrix.T if cut.member.transposed else matrix
    return as_kernel(stored.contiguous(), cut.member.shape.conv)


def _sizes(shape: LayerShape) -> dict[str, int]:
    """What layers call their sizes (nf and nx: those of GPT-2's Conv1D)."""
    rows, columns, conv = shape.out_features, shape.in_features, shape.conv
    if conv is None:
        return {"out_features": rows, "in_features": columns, "nf": rows, "nx": columns}
    channels = columns // math.prod(conv.kernel) * conv.groups
    return {"out_channels": rows, "in_channels": channels, "groups": conv.groups}


def _set_sizes(layer: nn.Module, sizes: Mapping[str, int]) -> None:
    for name, size in sizes.items():
        if hasattr(layer, name):
            setattr(layer, name, size)
