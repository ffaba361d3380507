"""What a router sends to each expert, and what each adds: summed over tokens.

What an expert adds to a token is what the sub-block's output would lack without it, its gate
included. Of a stack that is called with the numbers and gates of each token's experts, `[tokens,
chosen]`, it is what the call gives with one of a token's experts at a time. Of a list it is the
expert's output times the derivative of the sum of the sub-block's output by it, which is the gate.
Both are checked.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from apportion.errors import InvalidInput
from apportion.spaces.activations import changed
from apportion.spaces.batches import main_tensor
from apportion.spaces.compressors.compose import InputStatistics
from apportion.spaces.fewer import experts_of
from apportion.spaces.narrowing import moved, shared_copy
from apportion.spaces.probing import first_tensor
from apportion.spaces.sites import Site, Width
from apportion.spaces.trials import Run
from apportion.spaces.views import parameter_at

EXACT, SHORT = 1e-4, 3e-2
"""Of a norm: what float32, or fewer bits, may round."""


class NotSeen(Exception):
    """What each expert adds cannot be told from outside; says why."""


@dataclass(frozen=True)
class Routing:
    """Sums over tokens, float64.

    Attributes:
        logits: [experts, experts], of l l^T, l a token's logits.
        counts: [experts], tokens that the expert adds to.
        added: [experts], norms of what it adds to a token: gate times the norm of its output.
        tokens: how many there were.
    """

    logits: Tensor
    counts: Tensor
    added: Tensor
    tokens: int

    @classmethod
    def of(cls, stored: InputStatistics) -> Self:
        """Inverse of how `routed` gives it; its tensors are views."""
        rows, experts = stored.second_moment, stored.second_moment.shape[1]
        return cls(rows[:experts], rows[experts], rows[experts + 1], stored.tokens)


def no_routing(experts: int) -> InputStatistics:
    """Of no token: what `Routing.of` takes, float64 [experts + 2, experts]."""
    return InputStatistics(torch.zeros(experts + 2, experts, dtype=torch.float64), 0)


@contextmanager
def routed(model: nn.Module, sites: Iterable[Site]) -> Iterator[dict[str, InputStatistics]]:
    """Sum what the experts among `sites` are sent and add, in every pass made meanwhile.

    To be entered before anything else watches the model: sub-blocks with lists of experts are run
    once more, as copies.

    Gives for each site with experts what `Routing.of` takes.

    Raises:
        InvalidInput: at the end, sums that are not finite; in a pass, what an expert adds cannot
            be seen.
    """
    sums: dict[str, InputStatistics] = {}
    handles: list[RemovableHandle] = []
    for site in sites:
        if site.width is not None and site.has_experts:
            (name,) = site.input_names
            sums[name] = no_routing(site.width.units)
            width = moved(site.width, site.name, "")
            handles += _watch(model.get_submodule(site.name), width, sums[name])
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()
    for name, found in sums.items():
        if not bool(found.second_moment.isfinite().all()):
            raise InvalidInput(f"data.calibration: what enters the experts of {name} is not finite")


def routing_of(module: nn.Module, width: Width, run: Run) -> Routing:
    """What one run of a sub-block sends to each expert.

    Args:
        module: the sub-block.
        width: its width in experts, with paths below it.
        run: runs it.

    Raises:
        NotSeen: what each expert adds cannot be told.
    """
    found = no_routing(width.units)
    watched = shared_copy(module)
    reasons: list[NotSeen] = []
    handles = _watch(watched, width, found, reasons.append)
    try:
        run(watched)
    finally:
        for handle in handles:
            handle.remove()
    if reasons:
        raise reasons[0]
    return Routing.of(found)


def _raise(reason: NotSeen) -> None:
    raise InvalidInput(f"data.calibration: what each expert adds cannot be seen: {reason}")


def _watch(
    module: nn.Module,
    width: Width,
    found: InputStatistics,
    tell: Callable[[NotSeen], None] = _raise,
) -> list[RemovableHandle]:
    """Hooks that add to what was found; `tell` is told what cannot be seen."""
    experts = experts_of(width)
    seen, lists = Routing.of(found), experts.lists
    holders = {c.member.module for g in width.groups[: width.units] for c in g}
    stacked = {path for path in holders if not path.startswith(lists or "\0")}
    handles = []
    # Before there are hooks that it would have too.
    copied = shared_copy(module) if lists else module
    for path in experts.routers:
        owner = module.get_submodule(path.rpartition(".")[0])
        note = _guarded(_add_logits(parameter_at(module, path), owner, found, seen), tell)
        handles.append(owner.register_forward_pre_hook(note, with_kwargs=True))
    whole = len(stacked) + len(lists)
    if whole != 1:
        tell(NotSeen(f"they lie in {whole} modules or lists"))
    elif stacked:
        holder = module.get_submodule(next(iter(stacked)))
        hook = _guarded(_add_chosen(seen), tell)
        handles.append(holder.register_forward_hook(hook, with_kwargs=True))
    else:
        hook = _guarded(_add_listed(copied, lists[0], seen), tell)
        handles.append(module.register_forward_hook(hook, with_kwargs=True))
    return handles


Hook = Callable[..., None]


def _guarded(hook: Hook, tell: Callable[[NotSeen], None]) -> Hook:
    def note(*told: Any) -> None:
        # Whatever watches torch's functions must not see what is computed here.
        with torch._C.DisableTorchFunction():
            try:
                hook(*told)
            except NotSeen as reason:
                tell(reason)

    return note


def _add_logits(weight: Tensor, owner: nn.Module, found: InputStatistics, seen: Routing) -> Hook:
    bias = getattr(owner, "bias", None)

    def note(module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        given = first_tensor(args, keywords)
        if given is None or given.shape[-1] != weight.shape[1]:
            raise NotSeen("their router is not given what it multiplies")
        logits = given.reshape(-1, given.shape[-1]).double() @ weight.double().T
        if isinstance(bias, Tensor):
            logits += bias.double()
        seen.logits.add_((logits.T @ logits).cpu())
        found.tokens += len(logits)

    return note


def _add_chosen(seen: Routing) -> Hook:
    """For a module with stacks that is given the experts of each token, and their gates."""

    def note(
        module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any], output: Any
    ) -> None:
        given = [each for each in (*args, *keywords.values()) if isinstance(each, Tensor)]
        numbers = [each for each in given if each.ndim == 2 and not each.is_floating_point()]
        gates = (
            [t for t in given if t.is_floating_point() and t.shape == numbers[0].shape]
            if len(numbers) == 1
            else []
        )
        if len(gates) != 1:
            raise NotSeen("their module is not called with the numbers and gates of a token's own")
        rest = main_tensor(output).double()
        size = float(rest.norm())
        for slot in range(numbers[0].shape[1]):
            own = changed([args, keywords], _only(slot, (numbers[0], gates[0])))
            alone = main_tensor(module.forward(*own[0], **own[1])).double()
            rest = rest - alone
            norms = alone.reshape(len(numbers[0]), -1).norm(dim=1)
            _add(seen, numbers[0][:, slot], norms, gates[0][:, slot] != 0)
        if float(rest.norm()) > _tolerance(gates[0]) * size:
            raise NotSeen("what they add to a token is not the sum of what each adds alone")

    return note


def _only(slot: int, chosen: Sequence[Tensor]) -> Callable[[Tensor], Tensor]:
    def one(tensor: Tensor) -> Tensor:
        return tensor[:, slot : slot + 1] if any(tensor is each for each in chosen) else tensor

    return one


def _add(seen: Routing, numbers: Tensor, norms: Tensor, active: Tensor) -> None:
    """Add what experts `numbers` [n] gave, where they are active."""
    numbers, norms = numbers[active].long().cpu(), norms[active].double().cpu()
    seen.counts.index_add_(0, numbers, torch.ones_like(norms))
    seen.added.index_add_(0, numbers, norms)


def _tolerance(tensor: Tensor) -> float:
    return SHORT if tensor.element_size() < 4 else EXACT


def _add_listed(copied: nn.Module, path: str, seen: Routing) -> Hook:
    """For a sub-block with a list of experts, by a run of a copy with derivatives."""
    given: dict[int, Tensor] = {}

    def begin(number: int) -> Callable[[nn.Module, Any, Any], Tensor]:
        def stand_in(module: nn.Module, args: Any, output: Any) -> Tensor:
            if number in given or not isinstance(output, Tensor):
                raise NotSeen(f"{path}.{number} is called twice, or gives no tensor")
            given[number] = output.detach().requires_grad_()
            # A clone, because the forward may change it in place.
            return given[number].clone()

        return stand_in

    for number, item in enumerate(copied.get_submodule(path).children()):
        item.register_forward_hook(begin(number))

    def note(
        module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any], output: Any
    ) -> None:
        given.clear()
        with torch.enable_grad():
            again = main_tensor(copied(*args, **keywords)).sum()
        if not given or not again.requires_grad:
            raise NotSeen(f"{path} are not called as modules")
        numbers, outputs = list(given), list(given.values())
        for number, y, gate in zip(numbers, outputs, _gates(again, outputs), strict=True):
            norms = (y.detach().double() * gate).reshape(-1, y.shape[-1]).norm(dim=1)
            active = (gate != 0).reshape(-1, y.shape[-1]).any(1)
            _add(seen, torch.full_like(norms, number), norms, active)

    return note


def _gates(total: Tensor, outputs: Sequence[Tensor]) -> Iterator[Tensor]:
    """The derivative by each output, which is the same for all features of a token."""
    grads = torch.autograd.grad(total, outputs, allow_unused=True)
    for y, found in zip(outputs, grads, strict=True):
        grad = torch.zeros_like(y) if found is None else found
        if float((grad - grad[..., :1]).norm()) > _tolerance(grad) * float(grad.norm()):
            raise NotSeen("their outputs are not multiplied by a gate and summed up")
        yield grad.double()
