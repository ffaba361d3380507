"""Members as views of a model's parameters: read one as a matrix, put realized matrices back."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from apportion.errors import InvalidInput
from apportion.spaces.compressors.compose import effective_methods
from apportion.spaces.grammar import Option
from apportion.spaces.sites import Member


def parameter_at(model: nn.Module, path: str) -> Tensor:
    """A parameter by its name in the model's state. Raises TypeError where there is none."""
    owner, _, name = path.rpartition(".")
    weight = getattr(model.get_submodule(owner), name, None)
    if not isinstance(weight, Tensor):
        raise TypeError(f"{owner} holds no {name}")
    return weight


def set_parameter(model: nn.Module, path: str, values: Tensor) -> None:
    """Put a tensor in the place of a parameter; whoever shares the old one keeps it."""
    owner, _, name = path.rpartition(".")
    parameter = values
    if not isinstance(values, nn.Parameter):
        parameter = nn.Parameter(values, requires_grad=False)
    setattr(model.get_submodule(owner), name, parameter)


def matrix_of(parameter: Tensor, member: Member) -> Tensor:
    """A member's matrix `[out, in]` in its parameter."""
    weight = parameter if member.index is None else parameter[member.index]
    matrix = weight.T if member.transposed else weight
    return matrix.reshape(member.shape.out_features, member.shape.in_features)


def not_written_back(option: Option, unseen: str | None) -> str | None:
    """Why an option cannot be written back, None if it can.

    Args:
        option: what would be done to the weights.
        unseen: why nobody sees what they are multiplied with, or None.
    """
    if option.activation_bits is not None:
        return "where weights are written back, what enters the layer cannot be quantized"
    try:
        effective_methods(option, has_statistics=unseen is None)
    except InvalidInput as reason:
        return f"{unseen}: {reason}"
    return None


@torch.no_grad()
def written(
    parameters: Mapping[str, Tensor], members: Sequence[Member], matrices: Sequence[Tensor]
) -> dict[str, Tensor]:
    """Copies of parameters that hold matrices in the places of members.

    Args:
        parameters: name -> the dense parameter, for each that a member is a view of.
        members: the views.
        matrices: for each member `[out, in]`.
    """
    copies = {m.parameter_path: parameters[m.parameter_path].detach().clone() for m in members}
    for member, matrix in zip(members, matrices, strict=True):
        copy = copies[member.parameter_path]
        place = copy if member.index is None else copy[member.index]
        place.copy_((matrix.T if member.transposed else matrix).reshape(place.shape))
    return copies
