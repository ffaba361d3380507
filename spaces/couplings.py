"""Finds which layers of a sub-block hand units to which, by one run and its derivatives.

Every layer's output is replaced by random values that begin a derivative of their own. An input of
another layer that depends on them couples the two: what one gives are rows, what the other takes
are columns. The derivative of the first columns alone says which rows belong to them: the channel
of an MLP, or a key-value head with its queries. The rest of the units is expected at regular
distances; whoever uses a coupling proves it.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from apportion.spaces.probing import first_tensor
from apportion.spaces.sites import Cut, Member, Width

MOST_STACKS = 4
CHANNELS_FIRST = (_BatchNorm, nn.PReLU)

Groups = Sequence[Sequence[Member]]


@dataclass
class Flow:
    """What goes through a sub-block in a run in which its layers give random values.

    Attributes:
        members: path of a layer -> its weight view.
        starts: layer -> the random values in the place of its output.
        given: layer -> its input.
        between: grouped convolution, or other module with vectors -> its output.
    """

    members: Mapping[str, Member]
    starts: dict[str, Tensor] = field(default_factory=dict)
    given: dict[str, Tensor] = field(default_factory=dict)
    between: dict[str, Tensor] = field(default_factory=dict)
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    def hook(self, name: str) -> Callable[..., Tensor | None]:
        def watch(
            module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any], output: Any
        ) -> Tensor | None:
            given, member = first_tensor(args, keywords), self.members.get(name)
            if given is None or not isinstance(output, Tensor):
                return None
            if member is None or _is_grouped(member):
                self.between[name] = output
                return None
            self.given[name] = given
            self.starts[name] = self._random(output).requires_grad_()
            # A clone, because the forward may change it in place.
            return self.starts[name].clone()

        return watch

    def derivatives(self, probed: Mapping[str, int | None]) -> dict[str, Tensor]:
        """Layer or module -> derivative by what it gave, of inputs that depend on it.

        Args:
            probed: layer -> how many of the first features of its input count; None: all.
        """
        asked = {name: t for name, t in (self.starts | self.between).items() if t.requires_grad}
        weights = [self._random(self.given[name]) for name in probed]
        for (name, first), weight in zip(probed.items(), weights, strict=True):
            if first is not None:
                _features_last(weight, self.members[name])[..., first:] = 0
        grads = torch.autograd.grad(
            [self.given[name] for name in probed],
            list(asked.values()),
            weights,
            retain_graph=True,
            allow_unused=True,
        )
        return {n: g for n, g in zip(asked, grads, strict=True) if g is not None}

    def _random(self, like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=self.generator).to(like)


def _is_grouped(member: Member) -> bool:
    return member.shape.conv is not None and member.shape.conv.groups > 1


def _features_last(tensor: Tensor, member: Member) -> Tensor:
    """What a layer takes or gives, `[..., features]`."""
    return tensor if member.shape.conv is None else tensor.movedim(-3, -1)


def flow_of(module: nn.Module, groups: Groups, run: Callable[[nn.Module], object]) -> Flow:
    """Watch one run of a sub-block.

    Args:
        module: the sub-block.
        groups: its weights by shared input, with paths below it.
        run: calls a sub-block on what it was given.
    """
    flow = Flow({member.module: member for group in groups for member in group})
    learned = [parameter for parameter in module.parameters() if parameter.requires_grad]
    watched = [name for name, part in module.named_modules() if _has_vectors(part)]
    handles = [
        module.get_submodule(name).register_forward_hook(flow.hook(name), with_kwargs=True)
        for name in dict.fromkeys([*flow.members, *watched])
    ]
    try:
        for parameter in learned:
            parameter.requires_grad_(False)
        with torch.enable_grad():
            run(module)
    finally:
        for parameter in learned:
            parameter.requires_grad_(True)
        for handle in handles:
            handle.remove()
    return flow


def _has_vectors(module: nn.Module) -> bool:
    return any(tensor.ndim == 1 for tensor in _own_tensors(module))


def _own_tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters(recurse=False)
    yield from module.buffers(recurse=False)


def couplings(module: nn.Module, groups: Groups, flow: Flow) -> Iterator[Width | str]:
    """The widths that a sub-block may have, to be proven, or why layers that are coupled give none.

    A width of one unit is none: nothing of it can be left out.

    Args:
        module: the sub-block.
        groups: its weights by shared input, with paths below it.
        flow: what went through it.

    Raises:
        RuntimeError: torch cannot differentiate what the sub-block does.
    """
    sources = {
        name: {other for other in flow.derivatives({name: None}) if other in flow.starts}
        for name, given in flow.given.items()
        if given.requires_grad
    }
    for givers, takers in _joined(sources):
        units, parts = _units(flow, givers, takers)
        both = sorted(givers & takers)
        if both and units > 1:
            yield f"{both[0]} both gives and takes the same units"
        elif both:
            yield undivided(givers)
        else:
            yield _width(module, groups, flow, takers, units, parts)


def undivided(givers: Collection[str]) -> str:
    """That what some layers give is one unit."""
    names, verb = " and ".join(sorted(givers)), "gives" if len(givers) == 1 else "give"
    return (
        f"nothing of what {names} {verb} can be left out: all of it depends on all of it "
        "(one head, one key-value head, a norm over it), or lies at unlike distances"
    )


def _joined(sources: Mapping[str, set[str]]) -> list[tuple[set[str], set[str]]]:
    """Layers that give and layers that take, joined where two take from the same."""
    found: list[tuple[set[str], set[str]]] = []
    for taker, givers in sources.items():
        if not givers:
            continue
        joined = [pair for pair in found if pair[0] & givers]
        found = [pair for pair in found if not pair[0] & givers]
        found.append(
            (givers.union(*(p[0] for p in joined)), {taker}.union(*(p[1] for p in joined)))
        )
    return found


@dataclass(frozen=True)
class _Part:
    """What of a layer's or module's output belongs to the first unit."""

    derivative: Tensor
    stacks: int = 1


def _units(flow: Flow, givers: set[str], takers: set[str]) -> tuple[int, dict[str, _Part]]:
    """The largest number of units for which the first one depends on nothing of the others."""
    taken = {
        name: _features_last(flow.given[name], flow.members[name]).shape[-1] for name in takers
    }
    units = math.gcd(*taken.values())
    while True:
        parts: dict[str, _Part] = {}
        divisors, most = [units], units
        probed: dict[str, int | None] = {name: size // units for name, size in taken.items()}
        for name, derivative in flow.derivatives(probed).items():
            parts[name] = _Part(derivative)
            if name in flow.members:
                last = _features_last(derivative, flow.members[name])
                features, stacks = _layout(_touched(last), last.shape[-1])
                parts[name] = _Part(derivative, stacks)
                divisors.append(last.shape[-1] // stacks)
                most = min(most, last.shape[-1] // (stacks * features))
        if most == units and math.gcd(*divisors) == units:
            return units, parts
        shared = math.gcd(*divisors)
        units = next(count for count in range(most, 0, -1) if shared % count == 0)


def _touched(derivative: Tensor) -> list[int]:
    """Numbers of the features (last dimension) with a derivative."""
    by_feature = derivative.reshape(-1, derivative.shape[-1]).ne(0).any(0)
    return [int(place) for place in by_feature.nonzero().flatten()]


def _layout(touched: Sequence[int], size: int) -> tuple[int, int]:
    """Features and stacks of the smallest first unit that holds all that is touched."""
    covers = {
        stacks: max((place % (size // stacks) for place in touched), default=0) + 1
        for stacks in range(1, MOST_STACKS + 1)
        if size % stacks == 0
    }
    stacks = min(covers, key=lambda count: (covers[count] * count, count))
    return covers[stacks], stacks


def _width(
    module: nn.Module,
    groups: Groups,
    flow: Flow,
    takers: set[str],
    units: int,
    parts: Mapping[str, _Part],
) -> Width:
    def cut(member: Member) -> Cut:
        name, shape = member.module, member.shape
        if name in takers:
            return Cut(member, "in", shape.in_features // units)
        if name not in parts:
            return Cut(member, "whole")
        if name in flow.between:
            return Cut(member, "groups", shape.out_features // units)
        stacks = parts[name].stacks
        return Cut(member, "out", shape.out_features // (units * stacks), stacks)

    cuts = tuple(tuple(cut(member) for member in group) for group in groups)
    norms = tuple(
        name
        for name, part in parts.items()
        if name not in flow.members and _follows(module.get_submodule(name), part.derivative, units)
    )
    return Width("channel", units, cuts, norms)


def _follows(module: nn.Module, derivative: Tensor, units: int) -> bool:
    """Whether a module's vectors hold one place (or some) for each unit, not the same for all."""
    size = max(len(tensor) for tensor in _own_tensors(module) if tensor.ndim == 1)
    channels_first = isinstance(module, CHANNELS_FIRST) or derivative.shape[-1] != size
    last = derivative.movedim(1, -1) if channels_first and derivative.ndim > 1 else derivative
    return last.shape[-1] == size and size % units == 0 and len(_touched(last)) < size
