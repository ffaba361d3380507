"""Which implementation serves a layer, and why the others do not."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor, nn

from apportion.errors import ApportionError, InvalidInput
from apportion.kernels import integer_linear as integer
from apportion.kernels.conv import conv
from apportion.kernels.dense_linear import Build, Refuses, dense_linear
from apportion.kernels.formats import Format, LayerShape, StoredWeight
from apportion.kernels.input_scaled import input_scaled
from apportion.kernels.low_rank_linear import low_rank_linear

DEVICES = ("cpu",)


@dataclass(frozen=True)
class Implementation:
    """One way to run the layers that share an input.

    Args:
        name: What it is called in tables and artifacts.
        serves_not: Format, shapes and device -> why it does not serve them, or None.
        operator: Stored weights and biases, one per layer -> a module whose forward(x) gives a
            tuple of outputs, one per layer.
    """

    name: str
    serves_not: Refuses
    operator: Build

    def refuses(self, format: Format, shapes: Sequence[LayerShape], device: str) -> str | None:
        """None if it serves; otherwise the reason, a predicate of the implementation."""
        if device not in DEVICES:
            return f"runs on {', '.join(DEVICES)}, not on {device}"
        if len({shape.in_features for shape in shapes}) != 1 and not any(s.conv for s in shapes):
            return "needs layers that share one input"
        for shape in shapes:
            if format.group is not None and shape.in_features % format.group:
                return f"needs groups that divide {shape.in_features} inputs, not {format.group}"
        return self.serves_not(format, shapes, device)

    def build(self, weights: Sequence[StoredWeight], biases: Sequence[Tensor | None]) -> nn.Module:
        """The operator of a whole group, on the device that its weights are on.

        Raises:
            InvalidInput: If it does not serve one of the weights.
        """
        if not weights or len(weights) != len(biases):
            raise ApportionError(f"{len(weights)} weights and {len(biases)} biases make no group")
        # A group takes one option, which gives its members different sizes at most.
        formats = [weight.format for weight in weights]
        if len({replace(f, rank=None, input_rank=None, outliers=None) for f in formats}) != 1:
            raise InvalidInput(f"{self.name}: the layers of a group have one format")
        shapes = [weight.shape for weight in weights]
        devices = {str(t.device) for weight in weights for t in weight.tensors.values()}
        for weight, device in product(weights, devices):
            if reason := self.refuses(weight.format, shapes, device):
                raise InvalidInput(f"{self.name} {reason}")
        return self.operator(weights, biases)


def _floating() -> list[Implementation]:
    return [
        Implementation(f"{name}.{short}", *operator(dtype))
        for name, operator in (
            ("linear", dense_linear),
            ("low_rank", low_rank_linear),
            ("conv", conv),
        )
        for short, dtype in (
            ("f32", torch.float32),
            ("bf16", torch.bfloat16),
            ("fp16", torch.float16),
        )
    ]


def _integer() -> list[Implementation]:
    return [
        Implementation("int4pack.bf16", integer.refuses_int4, input_scaled(integer.Int4Linear)),
        Implementation("int8pack.bf16", integer.refuses_int8, input_scaled(integer.Int8Linear)),
        Implementation(
            "int8.onednn", integer.refuses_int8_activations, integer.int8_activation_linear
        ),
        Implementation("int8.reference", integer.refuses_reference_int8, integer.ReferenceInt8),
    ]


IMPLEMENTATIONS: dict[str, Implementation] = {
    each.name: each for each in [*_floating(), *_integer()]
}


def implementation(name: str) -> Implementation:
    """The implementation of that name. Raises InvalidInput, with those that there are."""
    if name not in IMPLEMENTATIONS:
        known = ", ".join(IMPLEMENTATIONS)
        raise InvalidInput(f"no implementation {name!r}; known: {known}")
    return IMPLEMENTATIONS[name]


def serving(format: Format, shapes: Sequence[LayerShape], device: str) -> list[Implementation]:
    """All that can run layers of these shapes, stored in one format, as one group."""
    return [
        each for each in IMPLEMENTATIONS.values() if each.refuses(format, shapes, device) is None
    ]


def refusals(format: Format, shapes: Sequence[LayerShape], device: str) -> dict[str, str]:
    """Why each of the others cannot, by name."""
    reasons = {name: each.refuses(format, shapes, device) for name, each in IMPLEMENTATIONS.items()}
    return {name: reason for name, reason in reasons.items() if reason is not None}
