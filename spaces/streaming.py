"""Calibration block by block: one block's statistics and one block's outputs at a time.

Each batch is run to the end of the first block; what that gives is kept, and the next pass over
the batches begins with it. A chain must prove itself: on the first batch every block must give
what it gives in an ordinary pass, to the last bit.

Several processes share the work by block: each walks the whole chain, but stops to watch at other
blocks than the rest. Of one that is another's it only makes the forward pass.
"""

from collections.abc import Callable, Mapping, Sequence
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


@dataclass(frozen=True)
class Step:
    """A portion's place in the chain: all that a process needs to collect it.

    Attributes:
        portion: what is collected.
        before: paths of the blocks that run before its own, in that order.
        expected: hash of what its block gives on the first batch; None: the portion lies outside of
            all blocks, and takes an ordinary pass.
        in_products: whether products are watched, for this portion or another.
    """

    portion: Portion
    before: tuple[str, ...]
    expected: str | None
    in_products: bool


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
    others: Sequence[Portion] = (),
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
        others: what was collected before.

    Returns:
        Why the blocks are no chain; None: they are, or none is wanted.

    Raises:
        InvalidInput: no data, or inputs that are not finite.
    """
    if not batches:
        raise InvalidInput("data.calibration: there is no calibration data")
    left = {portion.block: portion for portion in wanted}
    passes = _Passes(len(left) * len(batches), progress)
    inside = [portion for portion in wanted if portion.block is not None]
    walk = Walk(model, blocks, batches, activations, passes.one_more)
    reason = None
    try:
        for step in steps(model, blocks, inside, batches[0], others):
            keep(step.portion, walk.collect(step))
            del left[step.portion.block]
    except NoChain as error:
        reason = str(error)
        passes.begin_again(len(batches))
    activations.clear()
    if not left:
        return reason
    sites = [site for portion in left.values() for site in portion.sites]
    added = [site for portion in left.values() for site in portion.added]
    with _alike(_in_products(model, [*wanted, *others])):
        sums = collect(model, sites, batches, lambda _: passes.one_more(), added)
    for portion in left.values():
        names = [name for site in portion.sites for name in site.input_names]
        names += [site.name for site in portion.added]
        keep(portion, {name: sums.pop(name) for name in names if name in sums})
    return reason


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


def steps(
    model: nn.Module,
    blocks: Sequence[Site],
    wanted: Sequence[Portion],
    batch: Batch,
    others: Sequence[Portion] = (),
) -> list[Step]:
    """The portions in the order of a walk, from one ordinary pass on the first batch.

    Args:
        model: the dense model.
        blocks: its blocks, wanted or not.
        wanted: what to collect. What lies outside of all blocks comes first: it takes longest.
        batch: the first one.
        others: what was collected before.

    Raises:
        NoChain: the blocks are none.
    """
    inside = {portion.block: portion for portion in wanted if portion.block is not None}
    in_products = _in_products(model, [*wanted, *others])
    with _alike(in_products):
        given = _given(model, blocks, inside, batch) if inside else {}
    found = [Step(portion, (), None, in_products) for portion in wanted if portion.block is None]
    order = tuple(given)
    for place, (block, expected) in enumerate(given.items()):
        if block in inside:
            found.append(Step(inside[block], order[:place], expected, in_products))
    return found


def _in_products(model: nn.Module, some: Sequence[Portion]) -> bool:
    return bool(seen_in_products(model, [site for portion in some for site in portion.sites]))


def _given(
    model: nn.Module, blocks: Sequence[Site], inside: Mapping[str, Portion], batch: Batch
) -> dict[str, str]:
    """Block -> hash of what it gives, in the order of execution. Raises NoChain."""
    layers = {
        site.members[0].module: block
        for block, portion in inside.items()
        for site in portion.sites
        if site.unseen is None
    }
    layers |= {site.name: block for block, portion in inside.items() for site in portion.added}
    given = trace(model, [block.name for block in blocks], layers, batch)
    if unseen := inside.keys() - given.keys():
        raise NoChain(f"block {min(unseen)} is not run on every batch")
    return given


class Walk:
    """One process's way through the blocks; what the last block gave that it stopped at is kept."""

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[Site],
        batches: Sequence[Batch],
        activations: Activations,
        one_more: Callable[[], None] = lambda: None,
    ) -> None:
        """Begins before the first block.

        Args:
            model: the dense model.
            blocks: its blocks.
            batches: calibration data.
            activations: empty; holds what a block gave.
            one_more: is told of each forward pass.
        """
        self._model, self._batches, self._activations = model, batches, activations
        self._blocks = {block.name: block for block in blocks}
        self._one_more = one_more
        self._passed: tuple[str, ...] = ()

    @torch.no_grad()
    def collect(self, step: Step) -> Sums:
        """The statistics of a step; those behind the last one begin at the model's inputs again.

        Raises:
            NoChain: the blocks are none; what was collected before is right.
            InvalidInput: inputs that are not finite.
            OSError: the disk is full.
        """
        portion = step.portion
        with _alike(step.in_products):
            if portion.block is None or step.expected is None:
                told = lambda _: self._one_more()  # noqa: E731
                return collect(self._model, portion.sites, self._batches, told, portion.added)
            begin = self._passed
            if step.before[: len(begin)] != begin:
                begin = ()
                self._activations.clear()
            # Until this block is through there is nothing that a walk could go on from.
            self._passed = ()
            part = Part(self._model, [self._blocks[name] for name in begin], portion.block)
            try:
                sums = self._collected(part, step.expected, portion)
            except BaseException:
                self._activations.clear()
                raise
            self._passed = (*step.before, portion.block)
            return sums

    def _collected(self, part: Part, expected: str, portion: Portion) -> Sums:
        """Sum what a portion's sites take or add, and keep its block's outputs.

        Raises:
            NoChain: on the first batch the block gives something else than `expected`.
        """
        sites, model, activations = portion.sites, self._model, self._activations
        seen = routed(model, sites), watched(model, sites), adding(model, portion.added)
        with seen[0] as sent, seen[1] as sums, seen[2] as added, part.entered() as run:
            for number, batch in enumerate(self._batches):
                output = run(batch, activations.take(number) if part.before else None)
                if number == 0 and output_hash(output) != expected:
                    raise NoChain(f"block {part.last} depends on more than the block before")
                activations.put(number, output)
                self._one_more()
        return {**sent, **sums, **added}


def _alike(in_products: bool) -> AbstractContextManager[object]:
    """What all passes are made in, so that they give the same bits.

    While products are watched `nn.MultiheadAttention` takes another way: in some, so in all.
    """
    return BaseTorchFunctionMode() if in_products else nullcontext()
