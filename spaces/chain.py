"""A model's blocks as a chain: passes that begin after one block and end with another.

A pass that begins after a block runs the model's own forward on the same batch, in which the
blocks before hand their input on and that block returns what it gave before. So the next block is
given what an ordinary pass gives it, masks, positions and all, wherever a block depends on no
other block but the one before. Whether that holds is not assumed: whoever runs a part compares
what it gives on one batch with the trace of an ordinary pass.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from apportion.hashing import tensors_hash
from apportion.spaces.activations import leaves
from apportion.spaces.apply import Dropped
from apportion.spaces.batches import Batch, call
from apportion.spaces.sites import Site

Forward = Callable[..., Any]
Run = Callable[[Batch, Any], Any]


class NoChain(Exception):
    """The model cannot be run block by block; says why."""


class _Ended(BaseException):
    """Ends a pass at the end of a block. No Exception: a model may catch those."""

    def __init__(self, output: Any) -> None:
        self.output = output


@torch.no_grad()
def trace(
    model: nn.Module, blocks: Sequence[str], layers: Mapping[str, str], batch: Batch
) -> dict[str, str]:
    """Block -> hash of what it gives in an ordinary pass, in the order of execution.

    Args:
        model: the dense model.
        blocks: paths of its blocks.
        layers: path of a layer -> the block that it must run in.
        batch: what the pass is made on.

    Raises:
        NoChain: a block runs twice or inside another, or a layer runs outside of its block.
    """
    given: dict[str, str] = {}
    running: list[str] = []
    odd: list[str] = []

    def enter(block: str) -> Forward:
        def note(*_: Any) -> None:
            if running or block in given:
                odd.append(f"block {block} runs twice or inside another")
            running.append(block)

        return note

    def leave(block: str) -> Forward:
        def note(module: nn.Module, args: Any, output: Any) -> None:
            running.remove(block)
            given[block] = output_hash(output)

        return note

    def check(layer: str, block: str) -> Forward:
        def note(*_: Any) -> None:
            if running != [block]:
                odd.append(f"layer {layer} runs outside of block {block}")

        return note

    with ExitStack() as undo:
        for block in blocks:
            module = model.get_submodule(block)
            undo.callback(module.register_forward_pre_hook(enter(block)).remove)
            undo.callback(module.register_forward_hook(leave(block)).remove)
        for layer, block in layers.items():
            hook = model.get_submodule(layer).register_forward_pre_hook(check(layer, block))
            undo.callback(hook.remove)
        call(model, batch)
    if odd:
        raise NoChain(odd[0])
    return given


def output_hash(output: Any) -> str:
    """Content hash of the tensors that a block gives."""
    return tensors_hash({str(place): leaf for place, leaf in enumerate(leaves(output))})


@dataclass(frozen=True)
class Part:
    """The part of a model from the end of one block to the end of another.

    Attributes:
        before: the blocks that are not run again, in the order of execution; none: the part
            begins at the model's inputs.
        last: path of the block with which it ends.
    """

    model: nn.Module
    before: Sequence[Site]
    last: str

    @contextmanager
    def entered(self) -> Iterator[Run]:
        """A function of a batch, and of what the last block before gave on it: what `last` gives.

        Raises:
            NoChain: by the function, where the part cannot be run by itself.
        """
        slot: list[Any] = []
        with ExitStack() as undo:
            for place, block in enumerate(self.before, 1):
                module = self.model.get_submodule(block.name)
                forward = Dropped(block, module).forward
                if place == len(self.before):
                    forward = lambda *_, **__: slot.pop()  # noqa: E731
                undo.enter_context(_standing_in(module, forward))
            hook = self.model.get_submodule(self.last).register_forward_hook(_end)
            undo.callback(hook.remove)

            def run(batch: Batch, begin: Any) -> Any:
                slot[:] = [begin]
                return self._output(batch)

            yield run

    def _output(self, batch: Batch) -> Any:
        try:
            call(self.model, batch)
        except _Ended as ended:
            return ended.output
        except Exception as error:
            told = f"{type(error).__name__}: {error}"
            raise NoChain(f"block {self.last} cannot be run by itself ({told})") from error
        raise NoChain(f"block {self.last} is not run on every batch")


def _end(module: nn.Module, args: Any, output: Any) -> None:
    raise _Ended(output)


@contextmanager
def _standing_in(module: nn.Module, forward: Forward) -> Iterator[None]:
    # On the instance, so that the module's path, attributes and hooks stay what they are.
    before = vars(module).get("forward")
    vars(module)["forward"] = forward
    try:
        yield
    finally:
        del vars(module)["forward"]
        if before is not None:
            vars(module)["forward"] = before
