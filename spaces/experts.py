"""Finds the experts of a sub-block, and proves that some of them can be left out.

Nothing here lists models by name. Experts are the matrices of a stack, or the modules of a list,
among which a matrix with one output for each chooses: the router. To leave an expert out is to set
its logit to minus infinity, so a sub-block that really has fewer is run beside the dense one with
such logits. Where both give the same, and what each expert adds can be seen, experts are a width.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from apportion.spaces.couplings import Groups
from apportion.spaces.fewer import experts_of
from apportion.spaces.layouts import channel_cuts
from apportion.spaces.narrowing import narrow, shared_copy
from apportion.spaces.probing import Call
from apportion.spaces.products import COPIES, Whereabouts, factors
from apportion.spaces.routing import NotSeen, routing_of
from apportion.spaces.sites import Cut, Experts, Member, Width
from apportion.spaces.trials import NotRun, Run, difference, in_float32, runner
from apportion.spaces.views import parameter_at


def find_experts(module: nn.Module, groups: Groups, call: Call) -> Width | str | None:
    """The width of a sub-block in experts.

    Args:
        module: the sub-block.
        groups: its weights by what they are given, with paths below it.
        call: what it was given.

    Returns:
        A width with paths below the sub-block, proven by execution; the reason why its experts
        cannot be left out; None: it has no experts.
    """
    counts = _counts(module, groups)
    if not counts:
        return None
    run, reasons = runner(call), list[str]()
    try:
        precise = in_float32(module)
        # What cannot be copied cannot be narrowed.
        shared_copy(precise)
        dense = run(precise)
        for count in counts:
            proposed = _proposal(precise, groups, count, run)
            found = None if proposed is None else _proven(precise, proposed, dense, run)
            if isinstance(found, Width):
                return found
            reasons += [] if found is None else [found]
    except (RuntimeError, TypeError, NotRun) as failure:
        return f"its experts cannot be tried out ({failure})"
    return next(iter(reasons), None)


def _counts(module: nn.Module, groups: Groups) -> list[int]:
    """How many experts there may be, by stacks of matrices and lists of like modules."""
    stacks = {len(group) for group in groups if group[0].index is not None}
    lists = {len(items) for _, items in _lists(module)}
    return sorted(count for count in stacks | lists if count > 1)


def _lists(module: nn.Module) -> Iterator[tuple[str, nn.ModuleList]]:
    """The lists of like modules with matrices, but for those inside of others."""
    outer: list[str] = []
    for path, items in module.named_modules():
        if not isinstance(items, nn.ModuleList) or path.startswith(tuple(outer)):
            continue
        kinds = {(type(item), _shapes(item)) for item in items}
        if len(kinds) == 1 and any(len(shape) > 1 for _, shape in next(iter(kinds))[1]):
            outer.append(f"{path}.")
            yield path, items


def _shapes(module: nn.Module) -> tuple[tuple[str, torch.Size], ...]:
    return tuple((name, tensor.shape) for name, tensor in module.state_dict().items())


def _proposal(module: nn.Module, groups: Groups, count: int, run: Run) -> Width | None:
    """So many experts, if something chooses among them; what they need is not known yet."""
    lists = tuple(path for path, items in _lists(module) if len(items) == count)
    below = tuple(f"{path}." for path in lists)
    named = [*module.named_parameters(), *module.named_buffers()]
    held = {n: t for n, t in named if t.ndim and len(t) == count and not n.startswith(below)}
    per_expert = [_of_expert(groups, lists, count, number) for number in range(count)]
    shapes = {tuple(member.shape for member in expert) for expert in per_expert}
    if len(shapes) > 1 or not per_expert[0] or any(m.shape.conv for m in per_expert[0]):
        return None
    choosing = _Routers({name: t for name, t in held.items() if t.ndim == 2}, count)
    with choosing:
        run(module)
    if not choosing.seen:
        return None
    taken = {member.parameter_path for expert in per_expert for member in expert} | held.keys()
    others = (tuple(m for m in group if m.parameter_path not in taken) for group in groups)
    cuts = tuple(
        tuple(Cut(replace(member, written_back=True), "whole") for member in group)
        for group in (*per_expert, *others)
        if group
    )
    routers = tuple(sorted(choosing.seen))
    return Width("expert", count, cuts, (), Experts(routers, tuple(held), lists, count))


def _of_expert(groups: Groups, lists: Sequence[str], count: int, number: int) -> list[Member]:
    """The matrices of one expert."""
    items = tuple(f"{path}.{number}." for path in lists)
    stacks = [group for group in groups if group[0].index is not None and len(group) == count]
    listed = [m for group in groups for m in group if f"{m.module}.".startswith(items or "\0")]
    return [*listed, *(stack[number] for stack in stacks)]


class _Routers(TorchFunctionMode):
    """Sees which matrices choose, and can make it impossible that they choose some experts."""

    def __init__(self, matrices: Mapping[str, Tensor], experts: int, gone: Sequence[int] = ()):
        super().__init__()
        self.seen: set[str] = set()
        self._where = Whereabouts(matrices)
        self._experts = experts
        self._gone = torch.tensor(gone, dtype=torch.int64)

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        output, name = function(*args, **kwargs), getattr(function, "__name__", "")
        if not isinstance(output, Tensor):
            return output
        if name in COPIES and args:
            self._where.follow(name, args, output)
            return output
        taken = (self._where.name(factor.tensor) for factor in factors(name, args, kwargs))
        chosen = {path for path in taken if path is not None}
        if not chosen or output.shape[-1:] != (self._experts,):
            return output
        self.seen |= chosen
        return output.index_fill(-1, self._gone.to(output.device), -torch.inf)


def _proven(module: nn.Module, width: Width, dense: Tensor, run: Run) -> Width | str:
    """The width with what experts need, or why they cannot be left out."""
    least, failure = _least(module, width, run)
    if least == width.units:
        return (
            f"with fewer than its {width.units} experts its forward fails: a token is given to "
            f"all, or it takes their number from elsewhere than its weights ({failure})"
        )
    try:
        seen = routing_of(module, width, run)
    except NotSeen as why:
        return f"what each of its experts adds cannot be seen: {why}"
    for kept in _subsets(width.units, least, int(seen.added.argmax())):
        if reason := _refutation(module, width, kept, dense, run):
            return f"with {len(kept)} of {width.units} experts {reason}"
    channels = channel_cuts(module, width, dense, run)
    return replace(width, experts=replace(experts_of(width), least=least, channels=channels))


def _least(module: nn.Module, width: Width, run: Run) -> tuple[int, str]:
    """The least number of experts with which the sub-block runs, and why it does not with fewer."""
    failure = ""
    for kept in range(1, width.units):
        try:
            run(_with(module, width, range(kept)))
        except NotRun as reason:
            failure = str(reason)
        else:
            return kept, failure
    return width.units, failure


def _with(module: nn.Module, width: Width, kept: Sequence[int]) -> nn.Module:
    narrowed = shared_copy(module)
    narrow(narrowed, width, kept)
    return narrowed


def _subsets(units: int, least: int, busiest: int) -> Iterator[list[int]]:
    """Kept experts, up to three numbers of them, at random places but for the busiest."""
    generator = torch.Generator().manual_seed(0)
    others = torch.tensor([unit for unit in range(units) if unit != busiest])
    sizes = ((units - 1) * 2 // 3, (units - 1) // 3, least)
    for size in dict.fromkeys(max(least, size) for size in sizes):
        yield sorted(others[torch.randperm(units - 1, generator=generator)[:size]].tolist())


def _refutation(
    module: nn.Module, width: Width, kept: Sequence[int], dense: Tensor, run: Run
) -> str | None:
    """What a sub-block of some experts does else than the dense one that cannot choose others."""
    try:
        given = run(_with(module, width, kept))
    except NotRun as failure:
        return f"its forward fails ({failure})"
    reasons = []
    for vectors in (False, True):
        reason = difference(dense, run(_without(module, width, kept, vectors)), given)
        if reason is None:
            return None
        reasons.append(reason)
    return reasons[0]


def _without(
    module: nn.Module, width: Width, kept: Sequence[int], vectors: bool
) -> Callable[..., Any]:
    """The dense sub-block with the others' logits at minus infinity.

    Args:
        module: the sub-block.
        width: its width in experts.
        kept: numbers of the experts that stay.
        vectors: vectors `[experts]` are at minus infinity there too: what is added to scores for
            the choice alone (DeepSeek-V3's correction).
    """
    gone, experts = sorted(set(range(width.units)) - set(kept)), experts_of(width)
    matrices = {path: parameter_at(module, path) for path in experts.routers}
    changed: dict[str, Tensor] = {}
    for path in experts.tensors if vectors else ():
        vector = parameter_at(module, path).detach()
        if vector.ndim == 1 and vector.is_floating_point():
            changed[path] = vector.index_fill(0, torch.tensor(gone), -torch.inf)

    def forward(*args: Any, **keywords: Any) -> Any:
        with _Routers(matrices, width.units, gone):
            return functional_call(module, changed, args, keywords)

    return forward
