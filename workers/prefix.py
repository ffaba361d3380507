"""Starts a forward pass at the first block that differs from a pass that was made before."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Mark = tuple[str, ...]


class Gate:
    """Stands for a module's forward: runs it, runs what replaces it, or returns a stored output."""

    def __init__(self, module: nn.Module) -> None:
        self.forward: Callable[..., Any] = module.forward
        self.replacement: nn.Module | None = None
        self.replay: Any = None
        self.record: Callable[[Any], None] | None = None
        # On the instance, so that the module's path, attributes and hooks stay what they are.
        module.forward = self

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        """What the module's forward takes and returns."""
        if self.replay is not None:
            return copied(self.replay)
        if self.replacement is not None:
            output = self.replacement(*args, **keywords)
        else:
            output = self.forward(*args, **keywords)
        if self.record is not None:
            self.record(output)
        return output


@dataclass
class Prefix:
    """Outputs of the first blocks of one pass, and the options that each of them came from."""

    marks: list[Mark] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)

    def common(self, marks: Sequence[Mark]) -> int:
        """How many blocks in a row, from the first on, came from the same options."""
        pairs = enumerate(zip(self.marks, marks, strict=False))
        same = min(len(self.marks), len(marks))
        return next((place for place, (a, b) in pairs if a != b), same)


class PrefixCache:
    """Block outputs of the dense model and of the last configuration, for each chunk of data.

    What does not fit into the budget is not stored; room is made only by replacing the last
    configuration's outputs on the same chunk, so a scan over many chunks does not evict itself.
    """

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.used_bytes = 0
        self._dense: dict[Hashable, Prefix] = {}
        self._last: dict[Hashable, Prefix] = {}

    def clear(self) -> None:
        """Forget everything."""
        self._dense.clear()
        self._last.clear()
        self.used_bytes = 0

    def begin(self, chunk: Hashable, marks: Sequence[Mark], is_dense: bool) -> Prefix:
        """The longest stored prefix of a configuration, to be replayed and then to be extended.

        Args:
            chunk: names the data.
            marks: for each block in the order of execution, the options that it depends on.
            is_dense: the pass is the dense model's.
        """
        dense = self._dense.setdefault(chunk, Prefix())
        if is_dense:
            return dense
        last = self._last.setdefault(chunk, Prefix())
        kept, shared = last.common(marks), dense.common(marks)
        self.used_bytes -= sum(last.sizes[kept:])
        del last.marks[kept:], last.outputs[kept:], last.sizes[kept:]
        if shared > kept:
            last.marks += dense.marks[kept:shared]
            last.outputs += dense.outputs[kept:shared]
            last.sizes += [0] * (shared - kept)
        return last

    def extend(self, prefix: Prefix, place: int, mark: Mark, output: Any) -> None:
        """Store the output of block `place`, if those before it are there and it fits."""
        size = size_bytes(output)
        if place != len(prefix.outputs) or self.used_bytes + size > self.budget_bytes:
            return
        prefix.marks.append(mark)
        prefix.outputs.append(copied(output))
        prefix.sizes.append(size)
        self.used_bytes += size


class Blocks:
    """The blocks of a model in the order of execution."""

    def __init__(self, gates: Sequence[Gate], budget_bytes: int) -> None:
        self.gates = gates
        self.cache = PrefixCache(budget_bytes)

    def run(
        self,
        chunk: Hashable,
        marks: Sequence[Mark],
        is_dense: bool,
        forward: Callable[[], Any],
    ) -> Any:
        """The model's output, replaying the blocks that a stored prefix holds."""
        prefix = self.cache.begin(chunk, marks, is_dense)
        try:
            for place, gate in enumerate(self.gates):
                if place < len(prefix.outputs):
                    gate.replay = prefix.outputs[place]
                else:
                    gate.record = self._recorder(prefix, place, marks[place])
            return forward()
        finally:
            for gate in self.gates:
                gate.replay = gate.record = None

    def _recorder(self, prefix: Prefix, place: int, mark: Mark) -> Callable[[Any], None]:
        return lambda output: self.cache.extend(prefix, place, mark, output)


def copied(output: Any) -> Any:
    """A copy: models write into their activations in place."""
    if isinstance(output, Tensor):
        return output.clone()
    if isinstance(output, tuple | list):
        return type(output)(copied(item) for item in output)
    return output


def size_bytes(output: Any) -> int:
    """Bytes of all tensors of a nested output."""
    if isinstance(output, Tensor):
        return output.nbytes
    if isinstance(output, dict):
        return sum(size_bytes(item) for item in output.values())
    if isinstance(output, tuple | list):
        return sum(size_bytes(item) for item in output)
    return 0


def execution_order(
    model: nn.Module, blocks: Sequence[str], modules: Sequence[str], forward: Callable[[], Any]
) -> tuple[list[str], dict[str, int]]:
    """Watch one forward pass.

    Args:
        model: the dense model.
        blocks: paths of its blocks.
        modules: paths of the layers and modules whose place is asked for.
        forward: runs the pass.

    Returns:
        The blocks in the order in which they end (none where a block ran twice or never), and for
        each module how many blocks had ended when it was first called (0: never called).
    """
    ended: list[str] = []
    places = dict.fromkeys(modules, 0)
    seen: set[str] = set()

    def start(name: str) -> Callable[..., None]:
        def note(*_: Any) -> None:
            if name not in seen:
                seen.add(name)
                places[name] = len(ended)

        return note

    handles = [model.get_submodule(m).register_forward_pre_hook(start(m)) for m in places]
    handles += [
        model.get_submodule(b).register_forward_hook(lambda *_, name=b: ended.append(name))
        for b in blocks
    ]
    try:
        with torch.inference_mode():
            forward()
    finally:
        for handle in handles:
            handle.remove()
    once = sorted(ended) == sorted(blocks)
    return (ended if once else []), places
