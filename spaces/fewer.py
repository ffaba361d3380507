"""Experts left out of a sub-block: their matrices, their router's rows, and what counts them."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from apportion.spaces.sites import Experts, Width
from apportion.spaces.views import parameter_at, set_parameter


def experts_of(width: Width) -> Experts:
    """Where the experts of a width lie. Raises ValueError where it is none in experts."""
    if width.experts is None:
        raise ValueError(f"a width in {width.unit}s has no experts")
    return width.experts


@torch.no_grad()
def narrow_experts(module: nn.Module, width: Width, kept: Sequence[int]) -> None:
    """Leave experts of a sub-block out, in place; tensors that it shares stay as they are.

    Attributes that say how many there are follow: whole numbers of that value whose name has
    "expert" in it, and the outputs of a router that is a layer.

    Args:
        module: the sub-block.
        width: its width in experts, with paths below the sub-block.
        kept: numbers of the experts that stay, ascending.

    Raises:
        ValueError: the width is not one in experts.
    """
    experts = experts_of(width)
    for path in experts.tensors:
        owner, _, name = path.rpartition(".")
        holder, values = module.get_submodule(owner), parameter_at(module, path)[list(kept)]
        if name in dict(holder.named_parameters(recurse=False)):
            set_parameter(module, path, values)
        else:
            setattr(holder, name, values)
        if getattr(holder, "out_features", None) == width.units:
            vars(holder)["out_features"] = len(kept)
    for path in experts.lists:
        items = module.get_submodule(path)
        if isinstance(items, nn.ModuleList):
            stay = [items[unit] for unit in kept]
            del items[:]
            items.extend(stay)
    for part in module.modules():
        for name, value in list(vars(part).items()):
            if type(value) is int and value == width.units and "expert" in name:
                setattr(part, name, len(kept))


def expert_tensors(model: nn.Module, width: Width, kept: Sequence[int]) -> dict[str, Tensor]:
    """All but the groups' weights that fewer experts make less: routers, biases, vectors.

    Args:
        model: the model that the width's paths belong to.
        width: the width of one of its sub-blocks; without experts there is nothing.
        kept: numbers of the experts that stay, ascending.

    Returns:
        Name in the model's state -> the values of the kept experts, `[kept, ...]`; in a list of
        experts those that now have this name, empty where none has it any more.
    """
    if width.experts is None:
        return {}
    weights = {cut.member.parameter_path for cut in width.cuts}
    left = [path for path in width.experts.tensors if path not in weights]
    found = {path: parameter_at(model, path).detach()[list(kept)] for path in left}
    for path in width.experts.lists:
        for place in range(width.units):
            item = model.get_submodule(f"{path}.{place}")
            moves_up = place < len(kept)
            there = model.get_submodule(f"{path}.{kept[place]}") if moves_up else item
            for name, tensor in there.state_dict().items():
                if f"{path}.{place}.{name}" not in weights:
                    value = tensor if moves_up else tensor.new_empty(0)
                    found[f"{path}.{place}.{name}"] = value
    return found
