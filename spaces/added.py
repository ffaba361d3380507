"""What sub-blocks and blocks add to the hidden state, summed over calibration: for `drop:mean`.

Of all constants in place of what a sub-block adds, its mean has the least squared error on the
calibration tokens. FLAP (An et al., AAAI 2024, "Fluctuation-based Adaptive Structured Pruning for
Large Language Models") makes up for what it removes by a bias of the same kind.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from apportion.errors import InvalidInput
from apportion.hashing import tensors_hash
from apportion.spaces.batches import main_tensor
from apportion.spaces.probing import first_tensor
from apportion.spaces.sites import Site


@dataclass
class Added:
    """What a module added to what it was given.

    Attributes:
        total: float64 of `Site.constant`'s shape, the sum over tokens (or places of maps).
        tokens: how many were summed.
    """

    total: Tensor
    tokens: int

    @property
    def hash(self) -> str:
        """Content hash."""
        return tensors_hash({"total": self.total, "n": torch.tensor(self.tokens)})

    def mean(self, dtype: torch.dtype) -> Tensor:
        """The constant of least squared error, in the shape of `total`.

        Raises:
            InvalidInput: it is too large for `dtype`.
        """
        constant = (self.total / self.tokens).to(dtype)
        if not bool(constant.isfinite().all()):
            raise InvalidInput(f"the mean of what is added is too large for {dtype}")
        return constant

    def add(self, hidden: Tensor, sign: int = 1) -> int:
        """Add the sum of a hidden state's tokens, or take it away; gives how many they are."""
        self.total += sign * hidden.double().sum_to_size(self.total.shape)
        return hidden.numel() // self.total.numel()


@contextmanager
def adding(model: nn.Module, sites: Iterable[Site]) -> Iterator[Mapping[str, Added]]:
    """Sum what structure sites add, in every pass that is made meanwhile, each in float64.

    Of a module that adds its input itself that is its output less its input, of any other its
    output.

    Raises:
        InvalidInput: at the end, a site that never ran, or outputs that are not finite.
    """
    sums: dict[str, Added] = {}
    handles = []
    for site in sites:
        sums[site.name] = Added(torch.zeros(site.constant, dtype=torch.float64), 0)
        module = model.get_submodule(site.name)
        if site.residual_inside:
            # Before it runs: a module may write into its input.
            note = _take_input(sums[site.name])
            handles.append(module.register_forward_pre_hook(note, with_kwargs=True))
        handles.append(module.register_forward_hook(_add_output(sums[site.name])))
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()
    for name, found in sums.items():
        if found.tokens == 0:
            raise InvalidInput(f"data.calibration: {name} never runs; drop:mean needs its outputs")
        if not bool(found.total.isfinite().all()):
            raise InvalidInput(f"data.calibration: what {name} adds is not finite")


def _take_input(found: Added) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
    def note(module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        hidden = first_tensor(args, keywords)
        if hidden is not None:
            found.add(hidden, -1)

    return note


def _add_output(found: Added) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
    def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        found.tokens += found.add(main_tensor(output))

    return note
