"""Finds the matrices that a model multiplies by without calling a layer that we know.

Modules of torch whose weights are `[out, in]` by definition are known by their type. Elsewhere one
forward pass is watched: a parameter, or a view of one, that a product takes as its matrix is one,
and the side on which it stands says which of its dimensions are the inputs.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from apportion.kernels.formats import LayerShape
from apportion.spaces.batches import Batch, call
from apportion.spaces.products import Factor, Watch, Whereabouts
from apportion.spaces.sites import Member

# Their weights are [out, in, ...], and what they read of modules inside is read from them.
KNOWN = (
    nn.TransformerEncoderLayer,
    nn.MultiheadAttention,
    nn.RNNBase,
    nn.RNNCellBase,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
)
# Recurrent weights that the module's own input is multiplied with.
OF_THE_INPUT = ("weight_ih", "weight_ih_l0", "weight_ih_l0_reverse")
Views = dict[str, tuple[Member, ...]]


def known_views(
    model: nn.Module, called: set[str], left: Mapping[str, Tensor], unseen: dict[str, str]
) -> Views:
    """The matrices of modules whose type says how their weights are stored.

    Args:
        model: the model.
        called: paths of the modules that a forward pass called.
        left: parameter name -> parameter, for all that are in question.
        unseen: takes parameter name -> why nobody sees what it is multiplied with.

    Returns:
        Parameter name -> its members.
    """
    found: Views = {}
    for path, module in model.named_modules():
        if path not in called or not isinstance(module, KNOWN):
            continue
        for name, parameter in module.named_parameters():
            whole = f"{path}.{name}" if path else name
            is_matrix = parameter.ndim >= 2 and "weight" in name
            if is_matrix and whole in left and whole not in found:
                shape = LayerShape(len(parameter), parameter[0].numel())
                found[whole] = (Member(path, shape, parameter=name, written_back=True),)
                if not takes_input(module, name):
                    kind = type(module).__name__
                    unseen[whole] = f"{kind} multiplies by it where nobody sees what with"
    return found


def takes_input(module: nn.Module, parameter: str) -> bool:
    """Whether a parameter is multiplied with what its module is given, all of it and no more."""
    return isinstance(module, nn.RNNBase | nn.RNNCellBase) and parameter in OF_THE_INPUT


def watched_views(
    model: nn.Module,
    batch: Batch,
    called: set[str],
    left: Mapping[str, Tensor],
    unseen: dict[str, str],
) -> Views:
    """The matrices that one forward pass multiplies by; arguments and result as `known_views`.

    All matrices of a stack are found with the first one of it that is used.
    """
    flat = {n: p for n, p in left.items() if p.ndim in (2, 3) and p.is_contiguous() and p.numel()}
    if not flat:
        return {}
    transposed: dict[str, bool] = {}

    def note(name: str, factor: Factor, whereabouts: Whereabouts) -> None:
        flipped = whereabouts.is_flipped(name, factor.tensor)
        is_transposed = flipped == factor.inputs_last
        if transposed.setdefault(name, is_transposed) != is_transposed:
            unseen[name] = "the forward multiplies by it from both sides"
        elif factor.inputs is None or whereabouts.places(factor.tensor) is None:
            unseen[name] = "the forward multiplies by parts of it, or by it rearranged"

    with torch.no_grad(), Watch(flat, note):
        call(model, batch)
    return {
        name: tuple(_members(name, flat[name], transposed[name], called))
        for name in flat
        if name in transposed
    }


def _members(name: str, parameter: Tensor, transposed: bool, called: set[str]) -> Iterator[Member]:
    module = name.rpartition(".")[0]
    while module and module not in called:
        module = module.rpartition(".")[0]
    rows, columns = parameter.shape[-2:]
    shape = LayerShape(columns, rows) if transposed else LayerShape(rows, columns)
    below = name.removeprefix(module + ".") if module else name
    for index in range(len(parameter)) if parameter.ndim == 3 else (None,):
        yield Member(module, shape, transposed, below, index, written_back=True)


def routers(views: Views) -> dict[str, int]:
    """Parameter name -> number of experts, for matrices that choose among a stack beside them.

    Such a matrix has one output for each matrix of a stack below the module around its own.
    """
    stacks = {name: len(members) for name, members in views.items() if members[0].index is not None}
    found: dict[str, int] = {}
    for name, members in views.items():
        around = members[0].module.rpartition(".")[0]
        for stack, count in stacks.items():
            is_beside = stack.startswith(around + ".") if around else True
            if name not in stacks and is_beside and members[0].shape.out_features == count:
                found[name] = count
    return found
