"""Layers that share one input share one operator: it runs once, each takes its part."""

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class SharedOperator:
    """One operator for several layers, and the outputs that are not taken yet.

    No module itself, so that a model's state holds the operator once, at the first of its members.
    """

    def __init__(self, operator: nn.Module, count: int) -> None:
        self.operator = operator
        self.count = count
        self._waiting: dict[int, Tensor] = {}
        self._input: weakref.ref[Tensor] | None = None
        self._version = -1

    def output(self, index: int, x: Tensor) -> Tensor:
        """Member `index`'s output for x; runs the operator unless it did for this very x."""
        if self.count == 1 or x.is_inference():
            # An inference tensor counts no versions: whether it was changed cannot be known.
            return self._run(x)[index]
        if index not in self._waiting or not self._ran_for(x):
            self._waiting = waiting = dict(enumerate(self._run(x)))
            self._version = x._version
            # A member that is never called must not keep outputs of an input that is gone.
            self._input = weakref.ref(x, lambda _: waiting.clear())
        return self._waiting.pop(index)

    def _run(self, x: Tensor) -> tuple[Tensor, ...]:
        outputs: tuple[Tensor, ...] = self.operator(x)
        return outputs

    def _ran_for(self, x: Tensor) -> bool:
        return self._input is not None and self._input() is x and self._version == x._version

    def __getstate__(self) -> dict[str, Any]:
        """A copy starts without outputs."""
        return {**SharedOperator(self.operator, self.count).__dict__}


class GroupMember(nn.Module):
    """Stands where one layer stood and gives that layer's output."""

    def __init__(self, shared: SharedOperator, index: int) -> None:
        super().__init__()
        self.shared = shared
        self.index = index
        if index == 0:
            self.operator = shared.operator

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out].

        Under `torch.inference_mode` nothing is shared: prefer `torch.no_grad`.
        """
        return self.shared.output(self.index, x)


def members(operator: nn.Module, count: int) -> list[GroupMember]:
    """The modules to put where the group's layers stood, in the operator's order.

    Args:
        operator: What `Implementation.build` made: forward(x) gives a tuple of `count` outputs.
        count: The layers of the group.
    """
    shared = SharedOperator(operator, count)
    return [GroupMember(shared, index) for index in range(count)]


def joined_bias(biases: Sequence[Tensor | None], sizes: Sequence[int]) -> Tensor | None:
    """One bias for outputs one after another, zeros where a layer has none; None if none has."""
    if all(bias is None for bias in biases):
        return None
    parts = [
        torch.zeros(size) if bias is None else bias.detach().float()
        for bias, size in zip(biases, sizes, strict=True)
    ]
    return torch.cat(parts)


def resident_bytes(module: nn.Module) -> int:
    """Bytes that a module holds while it runs: parameters and buffers, shared storage once.

    Of weights in a library's own layout, the payload: its padding cannot be seen.
    """
    sizes: dict[int, int] = {}
    for tensor in [*module.parameters(), *module.buffers()]:
        if tensor.is_mkldnn:
            sizes[id(tensor)] = tensor.numel() * tensor.element_size()
        else:
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())
