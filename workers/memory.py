"""What a worker needs in memory, and what is free."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch
from torch import nn

from apportion.spaces.batches import Batch, call, main_tensor
from apportion.workers.evaluator import Budgets
from apportion.workers.prefix import size_bytes
from apportion.workers.samples import windows_in

# Logits of both models in float32, their logarithms, and one product of them.
LOSS_COPIES = 4
# The rest is for the system, the driver and Ray's own processes.
WORKERS_SHARE = 0.9
GROUPS = Path("/sys/fs/cgroup")
OWN_GROUPS = Path("/proc/self/cgroup")


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes that one worker takes.

    Attributes:
        model: parameters and buffers.
        references: outputs of the dense model that are kept.
        activations: of one forward pass and its loss.
        caches: block outputs and realized weights that are kept.
    """

    model: int
    references: int
    activations: int
    caches: int

    @property
    def total(self) -> int:
        """Bytes of all."""
        return self.model + self.references + self.activations + self.caches


def memory_need(
    model: nn.Module, blocks: Sequence[str], inputs: Batch, windows: int, budgets: Budgets
) -> MemoryNeed:
    """Estimate from one forward pass.

    Args:
        model: the dense model.
        blocks: paths of its blocks.
        inputs: what one forward pass of a study takes.
        windows: of the largest part that is evaluated.
        budgets: bounds of the caches.
    """
    layers, kept, output = _observed(model, set(blocks), inputs)
    passes = max(1.0, windows / windows_in(inputs))
    loss = LOSS_COPIES * main_tensor(output).numel() * torch.float32.itemsize
    size = model_bytes(model)
    return MemoryNeed(
        model=size,
        references=min(budgets.references, int(size_bytes(output) * passes)),
        activations=layers + loss,
        caches=min(budgets.prefixes, int(2 * kept * passes)) + min(budgets.realized, 4 * size),
    )


def model_bytes(model: nn.Module) -> int:
    """Bytes of parameters and buffers, shared ones once."""
    tensors = {id(t): t.nbytes for t in chain(model.parameters(), model.buffers())}
    return sum(tensors.values())


def available_bytes() -> int:
    """Memory that can be taken without swapping."""
    table = Path("/proc/meminfo")
    if table.is_file():
        for line in table.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def share_bytes(workers: int) -> int:
    """The most that one of so many workers may take for all to fit into this machine."""
    return int(WORKERS_SHARE * total_bytes() / workers)


def total_bytes(groups: Path = GROUPS, own: Path = OWN_GROUPS) -> int:
    """Memory of this machine, or of the control group that this process may not exceed.

    Args:
        groups: where control groups are mounted.
        own: the file that names those of this process.
    """
    return min([int(psutil.virtual_memory().total), *_group_limits(groups, own)])


def _group_limits(groups: Path, own: Path) -> Iterator[int]:
    """Limits of this process's group and of those it lies in, where there are any."""
    for line in own.read_text().splitlines() if own.is_file() else ():
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        # The second version of control groups has one tree, the first one for each controller.
        name = "memory.limit_in_bytes" if controllers else "memory.max"
        group = groups / controllers / path.lstrip("/")
        for folder in (group, *group.parents):
            file = folder / name
            if file.is_file() and (text := file.read_text().strip()).isdecimal():
                yield int(text)


@torch.inference_mode()
def _observed(model: nn.Module, blocks: set[str], inputs: Batch) -> tuple[int, int, Any]:
    """Bytes of layer outputs (of one block, if there are any) and of block outputs; the output."""
    layers: dict[str, int] = {}
    kept: dict[str, int] = {}

    def watch(name: str, sizes: dict[str, int]) -> Any:
        def note(module: nn.Module, arguments: Any, output: Any) -> None:
            sizes[name] = size_bytes(output)

        return note

    handles = [
        module.register_forward_hook(watch(name, kept if name in blocks else layers))
        for name, module in model.named_modules()
        if name in blocks or not list(module.children())
    ]
    try:
        output = call(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return sum(layers.values()) // max(1, len(blocks)), sum(kept.values()), output
