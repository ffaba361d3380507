"""Products, watched: the parameters that they take as matrices, and what these are multiplied with.

Whatever a forward does with a parameter, the product that it ends in is a function of torch's,
which is given a view of the parameter or a copy that can be followed. So it is seen of a matrix
that no layer holds, of each expert of a stack too, what it is multiplied with.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

PRODUCTS = frozenset(
    "matmul __matmul__ __rmatmul__ mm bmm addmm baddbmm grouped_mm _grouped_mm".split()
)
COPIES = frozenset(
    "__getitem__ index_select to type type_as float double half bfloat16 contiguous clone".split()
)


@dataclass(frozen=True)
class Factor:
    """What a product takes as its matrices.

    Attributes:
        tensor: [..., rows, columns].
        inputs_last: the product sums over the columns; otherwise over the rows.
        inputs: [..., n, in], what the matrices are multiplied with; leading dimensions broadcast
            with theirs. None: it is no such tensor.
        ends: int [matrices]: which rows of `inputs` [n, in] are a matrix's, by where they end;
            None: all are.
    """

    tensor: Tensor
    inputs_last: bool
    inputs: Tensor | None
    ends: Tensor | None = None

    def rows(self, places: Tensor) -> Iterator[tuple[int, Tensor]]:
        """(place, [n, in]) of each matrix: what it is multiplied with.

        Args:
            places: int [matrices], the place of each in its stack; some may be the same. Of one
                matrix [].
        """
        if self.inputs is None:
            return
        if places.ndim == 0:
            yield int(places), self.inputs.reshape(-1, self.inputs.shape[-1])
        elif self.ends is not None:
            begin = 0
            for place, end in zip(places.tolist(), self.ends.tolist(), strict=True):
                yield place, self.inputs[begin:end]
                begin = end
        else:
            around = np.broadcast_shapes(self.inputs.shape[:-2], places.shape)
            inputs, places = self.inputs.expand(*around, -1, -1), places.expand(around)
            for place in sorted(set(places.flatten().tolist())):
                yield place, inputs[places == place].reshape(-1, inputs.shape[-1])


def factors(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[Factor]:
    """The tensors that a function of torch's, by its name, may take as its matrices."""
    given = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
    if name == "linear":
        weight = kwargs["weight"] if "weight" in kwargs else args[1]
        yield Factor(weight, True, kwargs["input"] if "input" in kwargs else args[0])
    elif name == "einsum" and args and isinstance(args[0], str):
        listed = args[1] if len(args) > 1 and isinstance(args[1], list | tuple) else given
        yield from _summed(args[0], listed)
    elif "grouped_mm" in name and len(given) > 1:
        ends = kwargs.get("offs", given[2] if len(given) > 2 else None)
        left, right = given[:2]
        yield Factor(left, True, None)
        by_rows = ends is None or (left.ndim, right.ndim) == (2, 3)
        yield Factor(right, False, left if by_rows else None, ends)
    elif name in PRODUCTS and len(given) > 1:
        left, right = given[1:3] if name in ("addmm", "baddbmm") else given[:2]
        if name == "__rmatmul__":
            left, right = right, left
        if left.ndim > 1:
            yield Factor(left, True, right.mT if right.ndim > 1 else right[None])
        if right.ndim > 1:
            yield Factor(right, False, left if left.ndim > 1 else left[None])


def _summed(equation: str, listed: Iterable[Tensor]) -> Iterator[Factor]:
    """The factors of an einsum."""
    given, _, result = equation.replace(" ", "").partition("->")
    terms, tensors = given.split(","), list(listed)
    for place, (term, factor) in enumerate(zip(terms, tensors, strict=False)):
        before, last = (label not in result for label in ("__" + term)[-2:])
        if before == last:
            continue
        inputs = None
        if len(terms) == 2 and factor.ndim == len(term) in (2, 3):
            inputs = _as_rows(tensors[1 - place], terms[1 - place], term, last, result)
        yield Factor(factor, last, inputs)


def _as_rows(other: Tensor, labels: str, term: str, last: bool, result: str) -> Tensor | None:
    """The other operand of an einsum as [n, in], or [matrices, n, in] where it has a stack's label.

    Args:
        other: the operand.
        labels: its labels; dots come first.
        term: the labels of the matrices.
        last: whether the label that is summed over is the matrices' last.
        result: the labels of the result.
    """
    own = labels.lstrip(".")
    summed = term[-1] if last else term[-2]
    if own.count(summed) != 1 or "." in own or any(x not in result for x in own if x != summed):
        return None
    stack = [label for label in term[:-2] if label in own]
    if any(label in own for label in term[-2:] if label != summed):
        return None
    moved = [own.index(label) - len(own) for label in (*stack, summed)]
    inputs = other.movedim(moved, (*range(len(stack)), -1))
    return inputs.reshape(*inputs.shape[: len(stack)], -1, inputs.shape[-1])


class Whereabouts:
    """Knows parameters again, in views of them and in copies that a forward makes."""

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        """Takes contiguous matrices `[rows, columns]` and stacks of them, by their names."""
        self._parameters = parameters
        self._order = sorted(parameters, key=lambda name: parameters[name].data_ptr())
        self._starts = [parameters[name].data_ptr() for name in self._order]
        self._copies = WeakIdKeyDictionary()

    def name(self, tensor: Tensor) -> str | None:
        """The parameter that a tensor is a view or a copy of."""
        if tensor in self._copies:
            return str(self._copies[tensor][0])
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

    def places(self, tensor: Tensor) -> Tensor | None:
        """Which of a parameter's matrices a view or a copy holds: int [matrices], of one [].

        None: it holds parts of them, or they are arranged otherwise.
        """
        if tensor in self._copies:
            found: Tensor | None = self._copies[tensor][1]
            return found
        parameter = self._parameters[self.name(tensor) or ""]
        sizes, steps = parameter.shape[-2:], parameter.stride()[-2:]
        laid_out = (tuple(tensor.shape[-2:]), tensor.stride()[-2:])
        one = sizes[0] * sizes[1]
        first, inside = divmod(tensor.data_ptr() - parameter.data_ptr(), parameter.itemsize * one)
        if inside or laid_out not in ((sizes, steps), (sizes[::-1], steps[::-1])):
            return None
        if tensor.ndim == 2:
            return torch.tensor(first)
        is_stack = tensor.ndim == parameter.ndim == 3 and tensor.stride(0) == one
        return torch.arange(first, first + len(tensor)) if is_stack else None

    def follow(self, function: str, args: tuple[Any, ...], output: Tensor) -> None:
        """Take note of a copy of a stack's matrices, or of all in another dtype.

        Args:
            function: one of `COPIES`.
            args: what it was given: first the parameter, a view or a copy of it.
            output: what it gave.
        """
        source = args[0]
        name = self.name(source) if isinstance(source, Tensor) else None
        if name is None or self.name(output) is not None or source.ndim < 2:
            return
        is_alike = output.shape[-2:] == self._parameters[name].shape[-2:]
        if is_alike and not self.is_flipped(name, source):
            places = self.places(source)
            if places is not None and function in ("__getitem__", "index_select"):
                places = _picked(places, args[1:])
            if places is not None and places.shape != output.shape[:-2]:
                places = None
            self._copies[output] = name, places

    def is_flipped(self, name: str, view: Tensor) -> bool:
        """Whether the last two dimensions of a view are those of the parameter, exchanged."""
        rows, columns = self._parameters[name].shape[-2:]
        if rows != columns and sorted(view.shape[-2:]) == sorted((rows, columns)):
            return int(view.shape[-1]) == rows
        return view.stride(-1) != 1


def _picked(places: Tensor, how: tuple[Any, ...]) -> Tensor | None:
    """The places of the matrices that an index picks; None: it picks something else."""
    *before, index = how if len(how) == 2 else (0, *how)
    if places.ndim == 0 or before != [0] or isinstance(index, tuple):
        return None
    found: Tensor = places[index]
    return found


class Watch(TorchFunctionMode):
    """While entered, tells of each product that takes a parameter as its matrices."""

    def __init__(
        self, parameters: Mapping[str, Tensor], told: Callable[[str, Factor, Whereabouts], None]
    ) -> None:
        """Takes the parameters, as `Whereabouts` does, and who is told: of which, and how."""
        super().__init__()
        self._whereabouts = Whereabouts(parameters)
        self._told = told

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        function = getattr(func, "__name__", str(func))
        for factor in factors(function, args, kwargs):
            name = self._whereabouts.name(factor.tensor)
            if name is not None and factor.tensor.ndim > 1:
                self._told(name, factor, self._whereabouts)
        if function in COPIES and isinstance(output, Tensor):
            self._whereabouts.follow(function, args, output)
        return output
