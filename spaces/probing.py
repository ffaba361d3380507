"""One forward pass, watched: what every module was given and what it returned."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from apportion.spaces.batches import Batch, call


@dataclass
class Call:
    """What one module was given and returned in the probing run.

    Attributes:
        input: the first tensor that it was given.
        output: what it returned.
        args: all that it was given, by place.
        keywords: all that it was given, by name.
        count: how often it was called; the rest is of the first call.
    """

    input: Tensor
    output: Any
    args: tuple[Any, ...] = ()
    keywords: dict[str, Any] = field(default_factory=dict)
    count: int = 1


@dataclass
class Probe:
    """What every module was given, and which were called, with a tensor or without."""

    calls: dict[str, Call] = field(default_factory=dict)
    called: set[str] = field(default_factory=set)

    def hook(self, name: str) -> Callable[..., None]:
        def record(
            module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any], output: Any
        ) -> None:
            self.called.add(name)
            given = first_tensor(args, keywords)
            if given is None:
                return
            if name in self.calls:
                self.calls[name].count += 1
            else:
                self.calls[name] = Call(given, output, args, keywords)

        return record


def first_tensor(args: tuple[Any, ...], keywords: dict[str, Any]) -> Tensor | None:
    """The first tensor that a module is given, or None."""
    return next((a for a in (*args, *keywords.values()) if isinstance(a, Tensor)), None)


@torch.no_grad()
def probe(model: nn.Module, batch: Batch) -> Probe:
    """Run the model once and watch all its modules; the model itself is among the called."""
    seen = Probe()
    handles = [
        module.register_forward_hook(seen.hook(name), with_kwargs=True)
        for name, module in model.named_modules()
    ]
    try:
        call(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    seen.calls.pop("", None)
    return seen
