"""Finds what a sub-block is wide by, and proves it.

Nothing here lists models by name. `couplings` proposes units; a sub-block that really has fewer of
them is run beside the dense one in which the layers that take units multiply those left out by
zero. Where both give the same, the sub-block reads its width from its weights alone, and units can
be left out. Where not, the sub-block has no width, and is told why.
"""

import copy
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from apportion.spaces.activations import changed, leaves
from apportion.spaces.batches import main_tensor
from apportion.spaces.couplings import Groups, couplings, flow_of
from apportion.spaces.narrowing import moved, narrow, shared_copy
from apportion.spaces.probing import Call
from apportion.spaces.sites import Site, Width
from apportion.spaces.views import matrix_of, parameter_at

TOLERANCE = 1e-4
"""Of an output's norm in float32: what the same sums in another order may differ by."""
NO_CHANGE = 1e-6
"""Of an output's norm: a smaller change may be rounding, and shows nothing."""
# Attributes that say where a module stands, not what it does.
PLACE_WORDS = ("idx", "index", "layer_id", "layer_number")

Run = Callable[[Callable[..., Any]], Tensor]


class NotRun(Exception):
    """A sub-block's own code failed; says how."""


@torch.no_grad()
def find_widths(
    model: nn.Module,
    structure: Sequence[Site],
    weights: Sequence[Site],
    untreated: Mapping[str, str],
    calls: Mapping[str, Call],
) -> tuple[dict[str, Width], dict[str, str]]:
    """The widths of a model's sub-blocks, and of blocks without them.

    Of like sub-blocks one is proven.

    Args:
        model: the model.
        structure: blocks, sub-blocks and choice blocks.
        weights: weight sites.
        untreated: path of a layer, parameter or choice block that is no site -> the reason.
        calls: what each module was given.

    Returns:
        Name of a site -> its width; name of a site -> why it has none.
    """
    widths: dict[str, Width] = {}
    fixed: dict[str, str] = {}
    known: dict[Any, Width | str] = {}
    for site in structure:
        if site.kind == "choice":
            continue
        inside = [weight for weight in weights if _is_below(weight.members[0].module, site.name)]
        refusal = _refusal(site, structure, inside, untreated, calls)
        if refusal is not None:
            fixed[site.name] = refusal
            continue
        module, call = model.get_submodule(site.name), calls[site.name]
        groups = _groups_below(site.name, inside)
        likeness = _likeness(module, site.kind, groups, call)
        if likeness not in known:
            known[likeness] = find_width(module, site.kind, groups, call)
        match known[likeness]:
            case Width() as width:
                widths[site.name] = moved(width, "", site.name)
            case reason:
                fixed[site.name] = reason
    return widths, fixed


def _is_below(path: str, site: str) -> bool:
    return f"{path}.".startswith(f"{site}.")


def _refusal(
    site: Site,
    structure: Sequence[Site],
    inside: Sequence[Site],
    untreated: Mapping[str, str],
    calls: Mapping[str, Call],
) -> str | None:
    """Why a site has no width, from what is in it; None: it may have one."""
    for other in structure:
        if other.name != site.name and _is_below(other.name, site.name):
            if other.kind == "choice":
                return f"it holds the choice block {other.name}"
            return "it is as wide as its sub-blocks, which are narrowed each by itself"
    for weight in inside:
        if weight.written_back:
            return f"{weight.name} is written back: its module's forward is not known"
        for member in weight.members:
            if member.module not in calls:
                return f"{member.module}: the batch does not reach it"
    below = (f"{path}: {why}" for path, why in untreated.items() if _is_below(path, site.name))
    return next(below, None)


def _groups_below(site: str, inside: Iterable[Site]) -> Groups:
    return tuple(
        tuple(replace(m, module=m.module.removeprefix(site).lstrip(".")) for m in weight.members)
        for weight in inside
    )


def _likeness(module: nn.Module, kind: str, groups: Groups, call: Call) -> Any:
    """Equal for sub-blocks whose code, settings, shapes and inputs are; the tensors may differ."""
    settings = [
        (path, type(part), name, value if isinstance(value, str | int | float) else id(value))
        for path, part in module.named_modules()
        for name, value in vars(part).items()
        if not name.startswith("_") and not any(word in name for word in PLACE_WORDS)
    ]
    tensors = [(name, t.shape, t.dtype) for name, t in module.state_dict().items()]
    given = [(t.shape, t.dtype) for t in leaves([list(call.args), call.keywords])]
    return (kind, groups, tuple(settings), tuple(tensors), tuple(given), tuple(call.keywords))


def find_width(module: nn.Module, kind: str, groups: Groups, call: Call) -> Width | str:
    """The width of a sub-block, or why it has none; of several the one that saves most.

    Args:
        module: the sub-block.
        kind: that of its site.
        groups: its weights by what they are given, with paths below it.
        call: what it was given.

    Returns:
        A width with paths below the sub-block, proven by execution; or the reason.
    """
    run = _runner(call)
    try:
        precise = _in_float32(module)
        # What cannot be copied cannot be narrowed.
        shared_copy(precise)
    except (RuntimeError, TypeError) as failure:
        return f"it cannot be copied ({failure})"
    try:
        dense, flow = run(precise), flow_of(precise, groups, run)
        try:
            found = list(couplings(precise, groups, flow))
        except RuntimeError as failure:
            return f"torch cannot differentiate it ({failure})"
        widths = [replace(w, unit=_unit(w, kind)) for w in found if isinstance(w, Width)]
        refuted: list[str] = []
        for width in sorted(widths, key=_narrowed_weights, reverse=True):
            reason = _refutation(precise, width, dense, run)
            if reason is None:
                return width
            refuted.append(reason)
    except NotRun as failure:
        return f"it cannot be run by itself ({failure})"
    reasons = refuted + [reason for reason in found if isinstance(reason, str)]
    return reasons[0] if reasons else "no layer in it takes what another layer in it gives"


def _unit(width: Width, kind: str) -> Literal["head", "channel"]:
    of_many = any(cut.features > 1 for cut in width.cuts if cut.side == "out")
    return "head" if kind == "attention" and of_many else "channel"


def _narrowed_weights(width: Width) -> int:
    """How many weights become fewer with the units."""
    return sum(cut.member.shape.weights for cut in width.cuts if cut.side != "whole")


def _refutation(module: nn.Module, width: Width, dense: Tensor, run: Run) -> str | None:
    """Why a sub-block of fewer units is not the dense one without the others; None if it is."""
    for kept in _subsets(width.units):
        if reason := _difference(module, width, kept, dense, run):
            return f"with {len(kept)} of {width.units} {width.unit}s {reason}"
    return None


def _difference(
    module: nn.Module, width: Width, kept: Sequence[int], dense: Tensor, run: Run
) -> str | None:
    """What a sub-block of some units does else than the dense one without the others."""
    silenced = _silenced_weights(module, width, kept)
    expected = run(lambda *args, **keywords: functional_call(module, silenced, args, keywords))
    narrowed = shared_copy(module)
    narrow(narrowed, width, kept)
    try:
        given = run(narrowed)
    except NotRun as failure:
        return (
            f"its forward fails: it takes their number from elsewhere than its weights ({failure})"
        )
    change, size = float((expected - dense).norm()), float(dense.norm())
    if change <= NO_CHANGE * size:
        return "its output is the same, so nothing is proven"
    same_shape = given.shape == expected.shape
    error = float((given - expected).norm()) if same_shape else math.inf
    if not error <= min(TOLERANCE * size, change / 10):
        return "it does not give what it gives without the others, but depends on them"
    return None


def _subsets(units: int) -> Iterator[list[int]]:
    """Kept units, two numbers of them where there are, at random places but for the first."""
    generator = torch.Generator().manual_seed(0)
    for size in dict.fromkeys(max(1, (units - 1) * thirds // 3) for thirds in (2, 1)):
        order = torch.randperm(units - 1, generator=generator)[:size] + 1
        yield sorted(order.tolist())


def _silenced_weights(module: nn.Module, width: Width, kept: Sequence[int]) -> dict[str, Tensor]:
    """Parameter path -> dense weight, zero where it multiplies units that are not kept."""
    gone = sorted(set(range(width.units)) - set(kept))
    silenced: dict[str, Tensor] = {}
    for cut in width.cuts:
        if cut.side == "in":
            path = cut.member.parameter_path
            weight = parameter_at(module, path).detach().contiguous().clone()
            matrix_of(weight, cut.member)[:, cut.places(gone, width.units)] = 0
            silenced[path] = weight
    return silenced


def _in_float32(module: nn.Module) -> nn.Module:
    """The module, or a copy where it computes in fewer bits."""
    tensors = itertools.chain(module.parameters(), module.buffers())
    return copy.deepcopy(module).float() if any(map(_is_short, tensors)) else module


def _is_short(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.element_size() < 4


def _runner(call: Call) -> Run:
    """Runs a module on what it was given, in float32 and with noise, and without a cache.

    The noise, because tokens may be the same at all places: attention then does not show which
    queries and keys it takes. A cache holds what the probing run left in it.
    """
    noise = torch.randn(call.input.shape, generator=torch.Generator().manual_seed(0))

    def prepared(tensor: Tensor) -> Tensor:
        given = tensor.detach().float() if _is_short(tensor) else tensor.detach()
        if tensor is call.input and tensor.is_floating_point():
            return given + noise.to(given) * (float(given.std()) or 1)
        return given

    args = [None if _is_cache(value) else value for value in call.args]
    keywords = {n: None if _is_cache(value) else value for n, value in call.keywords.items()}
    given = changed([args, keywords], prepared)

    def run(forward: Callable[..., Any]) -> Tensor:
        # Clones, because the forward may change what it is given in place.
        args, keywords = changed(given, Tensor.clone)
        try:
            return main_tensor(forward(*args, **keywords))
        except Exception as error:
            told = str(error).strip().partition("\n")[0]
            raise NotRun(f"{type(error).__name__}: {told}") from error

    return run


def _is_cache(value: Any) -> bool:
    return hasattr(value, "get_seq_length")
