"""Finds the matrices that a model multiplies by without calling a layer that we know.

Modules of torch whose weights are `[out, in]` by definition are known by their type. Elsewhere one
forward pass is watched: a parameter, or a view of one, that a product takes as its matrix is one,
and the side on which it stands says which of its dimensions are the inputs.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from apportion.kernels.formats import LayerShape
from apportion.spaces.batches import Batch, call
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
PRODUCTS = frozenset(
    "matmul __matmul__ __rmatmul__ mm bmm addmm baddbmm grouped_mm _grouped_mm".split()
)
COPIES = frozenset("__getitem__ index_select to type type_as float contiguous".split())
Views = dict[str, tuple[Member, ...]]


def known_views(model: nn.Module, called: set[str], left: Mapping[str, Tensor]) -> Views:
    """The matrices of modules whose type says how their weights are stored.

    Args:
        model: the model.
        called: paths of the modules that a forward pass called.
        left: parameter name -> parameter, for all that are in question.

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
    return found


def watched_views(
    model: nn.Module, batch: Batch, called: set[str], left: Mapping[str, Tensor]
) -> Views:
    """The matrices that one forward pass multiplies by; arguments and result as `known_views`.

    All matrices of a stack are found with the first one of it that is used.
    """
    flat = {n: p for n, p in left.items() if p.ndim in (2, 3) and p.is_contiguous() and p.numel()}
    if not flat:
        return {}
    watch = _Watch(flat)
    with torch.no_grad(), watch:
        call(model, batch)
    return {
        name: tuple(_members(name, flat[name], watch.transposed[name], called))
        for name in flat
        if name in watch.transposed
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


class _Watch(TorchFunctionMode):
    """Notes which parameters products take as matrices, and whether they store `[in, out]`."""

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.transposed: dict[str, bool] = {}
        self._parameters = parameters
        self._order = sorted(parameters, key=lambda name: parameters[name].data_ptr())
        self._starts = [parameters[name].data_ptr() for name in self._order]
        self._copies = WeakIdKeyDictionary()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        name = getattr(func, "__name__", str(func))
        for factor, inputs_last in _factors(name, args, kwargs):
            self._note(factor, inputs_last)
        if name in COPIES and isinstance(output, Tensor):
            self._follow(args[0], output)
        return output

    def _note(self, factor: Tensor, inputs_last: bool) -> None:
        name = self._name(factor)
        if name is None or factor.ndim < 2 or name in self.transposed:
            return
        flipped = _is_flipped(factor, self._parameters[name])
        self.transposed[name] = flipped == inputs_last

    def _follow(self, source: Any, output: Tensor) -> None:
        """A copy of a stack's matrices, or of all in another dtype, stands for the parameter."""
        name = self._name(source) if isinstance(source, Tensor) else None
        if name is None or self._name(output) is not None:
            return
        if output.shape[-2:] == self._parameters[name].shape[-2:]:
            self._copies[output] = name

    def _name(self, tensor: Tensor) -> str | None:
        """The parameter that a tensor is a view or a copy of."""
        if tensor in self._copies:
            return str(self._copies[tensor])
        try:
            address = tensor.data_ptr()
        except RuntimeError:  # it has no memory of its own: sparse, or of torch.func
            return None
        place = bisect_right(self._starts, address) - 1
        if place < 0:
            return None
        name = self._order[place]
        parameter = self._parameters[name]
        return name if address < parameter.data_ptr() + parameter.nbytes else None


def _factors(
    name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Iterator[tuple[Tensor, bool]]:
    """The factors of a product, and whether it sums over their last dimension or the one before."""
    given = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
    if name == "linear":
        yield (kwargs["weight"] if "weight" in kwargs else args[1]), True
    elif name == "einsum" and args and isinstance(args[0], str):
        listed = args[1] if len(args) > 1 and isinstance(args[1], list | tuple) else given
        terms, _, result = args[0].replace(" ", "").partition("->")
        for term, factor in zip(terms.split(","), listed, strict=False):
            before, last = (label not in result for label in ("__" + term)[-2:])
            if before != last:
                yield factor, last
    elif name in PRODUCTS or "grouped_mm" in name:
        pair = given[1:3] if name in ("addmm", "baddbmm") else given[:2]
        if name == "__rmatmul__":
            pair.reverse()
        yield from zip(pair, (True, False), strict=False)


def _is_flipped(view: Tensor, parameter: Tensor) -> bool:
    """Whether the last two dimensions of a view are those of the parameter, exchanged."""
    rows, columns = parameter.shape[-2:]
    if rows != columns and sorted(view.shape[-2:]) == sorted((rows, columns)):
        return int(view.shape[-1]) == rows
    return view.stride(-1) != 1


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
