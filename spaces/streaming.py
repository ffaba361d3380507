"""Calibration block by block: one block's statistics and one block's outputs at a time.

Each batch is run to the end of the first block; what that gives is kept, and the next pass over
the batches begins with it. A chain must prove itself: on the first batch every block must give
what it gives in an ordinary pass, to the last bit.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn
from torch.overrides import BaseTorchFunctionMode

from apportion.errors import InvalidInput
from apportion.spaces.activations import Activations
from apportion.spaces.added import adding
from apportion.spaces.batches import Batch
from apportion.spaces.calibration import Sums, collect, seen_in_products, watched
from apportion.spaces.chain import NoChain, Part, output_hash, trace
from apportion.spaces.routing import routed
from apportion.spaces.sites import Site

Keep = Callable[["Portion", Sums], None]


@dataclass(frozen=True)
class Portion:
    """Sites whose statistics are collected together.

    Attributes:
        block: path of the block that they lie in; None: outside of all blocks.
        sites: weight sites, in the order of the space.
        added: structure sites of which is summed what they add.
    """

    block: str | None
    sites: tuple[Site, ...]
    added: tuple[Site, ...] = ()


def portions(
    sites: Sequence[Site], blocks: Sequence[Site], added: Sequence[Site] = ()
) -> list[Portion]:
    """The weight sites among `sites`, and the structure sites `added`, by their block."""
    inside: dict[str | None, tuple[list[Site], list[Site]]] = {}

    def put(site: Site, path: str, kind: int) -> None:
        around = (block.name for block in blocks if f"{path}.".startswith(block.name + "."))
        inside.setdefault(next(around, None), ([], []))[kind].append(site)

    for site in sites:
        if not site.is_structure:
            put(site, site.members[0].path, 0)
    for site in added:
        put(site, site.name, 1)
    return [Portion(block, tuple(own), tuple(more)) for block, (own, more) in inside.items()]


def stream(
    model: nn.Module,
    blocks: Sequence[Site],
    wanted: Sequence[Portion],
    batches: Sequence[Batch],
    activations: Activations,
    keep: Keep,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> str | None:
    """Second moments of each weight site's input and what is added, one block at a time.

    They are those of `collect` to the last bit. What lies outside of blocks, and all that is left
    where the blocks turn out to be no chain, is collected in one ordinary pass.

    Args:
        model: the dense model.
        blocks: its blocks, wanted or not.
        wanted: what to collect; other blocks are only run through.
        batches: calibration data.
        activations: empty; holds what a block gave.
        keep: takes a portion's statistics, which live no longer than this call.
        progress: told how many forward passes are done, and how many there are.

    Returns:
        Why the blocks are no chain; None: they are, or none is wanted.

    Raises:
        InvalidInput: no data, or inputs that are not finite.
    """
    if not batches:
        raise InvalidInput("data.calibration: there is no calibration data")
    left = {portion.block: portion for portion in wanted}
    passes = _Passes(len(left) * len(batches), progress)

    def keep_and_forget(portion: Portion, sums: Sums) -> None:
        keep(portion, sums)
        del left[portion.block]

    reason = None
    with _alike(model, wanted):
        try:
            _by_block(model, blocks, wanted, batches, activations, keep_and_forget, passes.one_more)
        except NoChain as error:
            reason = str(error)
            activations.clear()
            passes.begin_again(len(batches))
        if not left:
            return reason
        sites = [site for portion in left.values() for site in portion.sites]
        added = [site for portion in left.values() for site in portion.added]
        sums = collect(model, sites, batches, lambda _: passes.one_more(), added)
        for portion in left.values():
            names = [name for site in portion.sites for name in site.input_names]
            names += [site.name for site in portion.added]
            keep(portion, {name: sums.pop(name) for name in names if name in sums})
    return reason


def _alike(model: nn.Module, wanted: Sequence[Portion]) -> AbstractContextManager[object]:
    """What all passes are made in, so that they give the same bits.

    While products are watched `nn.MultiheadAttention` takes another way: in some, so in all.
    """
    sites = [site for portion in wanted for site in portion.sites]
    return BaseTorchFunctionMode() if seen_in_products(model, sites) else nullcontext()


class _Passes:
    """Counts forward passes."""

    def __init__(self, total: int, progress: Callable[[int, int], None]) -> None:
        self.done, self.total = 0, total
        self.progress = progress

    def one_more(self) -> None:
        self.done += 1
        self.progress(self.done, self.total)

    def begin_again(self, passes: int) -> None:
        """What was to come is replaced by one ordinary pass over all batches."""
        self.total = self.done + passes


@torch.no_grad()
def _by_block(
    model: nn.Module,
    blocks: Sequence[Site],
    wanted: Sequence[Portion],
    batches: Sequence[Batch],
    activations: Activations,
    keep: Keep,
    one_more: Callable[[], None],
) -> None:
    """Collect what lies in blocks. Raises NoChain; what was kept before is right."""
    inside = {portion.block: portion for portion in wanted if portion.block is not None}
    if not inside:
        return
    layers = {
        site.members[0].module: block
        for block, portion in inside.items()
        for site in portion.sites
        if site.unseen is None
    }
    layers |= {site.name: block for block, portion in inside.items() for site in portion.added}
    given = trace(model, [block.name for block in blocks], layers, batches[0])
    if unseen := inside.keys() - given.keys():
        raise NoChain(f"block {min(unseen)} is not run on every batch")
    order = sorted((b for b in blocks if b.name in given), key=lambda b: [*given].index(b.name))
    before: Sequence[Site] = ()
    for place, block in enumerate(order):
        if block.name in inside:
            portion = inside[block.name]
            part = Part(model, before, block.name)
            expected = given[block.name]
            keep(portion, _collected(part, expected, portion, batches, activations, one_more))
            before = order[: place + 1]
    activations.clear()


def _collected(
    part: Part,
    expected: str,
    portion: Portion,
    batches: Sequence[Batch],
    activations: Activations,
    one_more: Callable[[], None],
) -> Sums:
    """Sum what a portion's sites take or add, and put its block's outputs in their place.

    Raises:
        NoChain: on the first batch the block gives something else than `expected`.
    """
    sites, model = portion.sites, part.model
    seen = routed(model, sites), watched(model, sites), adding(model, portion.added)
    with seen[0] as sent, seen[1] as sums, seen[2] as added, part.entered() as run:
        for number, batch in enumerate(batches):
            output = run(batch, activations.take(number) if part.before else None)
            if number == 0 and output_hash(output) != expected:
                raise NoChain(f"block {part.last} depends on more than the block before")
            activations.put(number, output)
            one_more()
    return {**sent, **sums, **added}
