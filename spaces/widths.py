"""Finds what a sub-block is wide by, and proves it.

Nothing here lists models by name. `couplings` proposes units; a sub-block that really has fewer of
them is run beside the dense one in which the layers that take units multiply those left out by
zero. Where both give the same, the sub-block reads its width from its weights alone, and units can
be left out. Where not, the sub-block has no width, and is told why.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from apportion.spaces.activations import leaves
from apportion.spaces.couplings import Groups, couplings, flow_of, undivided
from apportion.spaces.experts import find_experts
from apportion.spaces.narrowing import moved, narrow, shared_copy
from apportion.spaces.probing import Call
from apportion.spaces.query_keys import find_query_keys
from apportion.spaces.sites import Site, Width
from apportion.spaces.trials import NotRun, Run, difference, in_float32, runner
from apportion.spaces.values import find_values
from apportion.spaces.views import matrix_of, parameter_at

# Attributes that say where a module stands, not what it does.
PLACE_WORDS = ("idx", "index", "layer_id", "layer_number")


@dataclass(frozen=True)
class Found:
    """What a sub-block can be made narrower by.

    Attributes:
        width: heads, channels or experts, or why there are none that can be left out.
        values: of attention its value dimensions, or why these stay; None: for the same reason.
        query_keys: likewise the dimensions of its queries and keys.
    """

    width: Width | str
    values: Width | str | None = None
    query_keys: Width | str | None = None

    def at(self, name: str) -> "Found":
        """The same with paths of the model, where they begin below the sub-block of that name."""

        def moved_there(width: Width | str | None) -> Width | str | None:
            return moved(width, "", name) if isinstance(width, Width) else width

        width = moved(self.width, "", name) if isinstance(self.width, Width) else self.width
        return Found(width, moved_there(self.values), moved_there(self.query_keys))


@torch.no_grad()
def find_widths(
    model: nn.Module,
    structure: Sequence[Site],
    weights: Sequence[Site],
    untreated: Mapping[str, str],
    calls: Mapping[str, Call],
) -> dict[str, Found]:
    """The widths of a model's sub-blocks, and of blocks without them, by their names.

    Of like sub-blocks one is proven.

    Args:
        model: the model.
        structure: blocks, sub-blocks and choice blocks.
        weights: weight sites.
        untreated: path of a layer, parameter or choice block that is no site -> the reason.
        calls: what each module was given.
    """
    widths: dict[str, Found] = {}
    known: dict[Any, Found] = {}
    experts: dict[Any, Width | str | None] = {}
    for site in structure:
        if site.kind == "choice":
            continue
        if refusal := _holds_structure(site, structure):
            widths[site.name] = Found(refusal)
            continue
        inside = [weight for weight in weights if _is_below(weight.members[0].module, site.name)]
        module, call = model.get_submodule(site.name), calls[site.name]
        groups = groups_below(site.name, inside)
        likeness = likeness_of(module, site.kind, groups, call)
        if likeness not in experts:
            experts[likeness] = find_experts(module, groups, call)
        mixture = experts[likeness]
        if isinstance(mixture, Width):
            widths[site.name] = Found(mixture).at(site.name)
            continue
        why = _refusal(site, inside, untreated, calls)
        if why is None and likeness not in known:
            known[likeness] = find_width(module, site.kind, groups, call)
        found = known[likeness] if why is None else Found(why)
        if mixture is not None and not isinstance(found.width, Width):
            found = Found(mixture)
        widths[site.name] = found.at(site.name)
    return widths


def parted(
    found: Mapping[str, Width | str | None],
) -> tuple[dict[str, Width], dict[str, str]]:
    """The widths, and the reasons where there is none, by their names."""
    widths = {name: each for name, each in found.items() if isinstance(each, Width)}
    return widths, {name: each for name, each in found.items() if isinstance(each, str)}


def _is_below(path: str, site: str) -> bool:
    return f"{path}.".startswith(f"{site}.")


def _holds_structure(site: Site, structure: Sequence[Site]) -> str | None:
    """Why a site with others in it has no width; None: there are none."""
    for other in structure:
        if other.name != site.name and _is_below(other.name, site.name):
            if other.kind == "choice":
                return f"it holds the choice block {other.name}"
            return "it is as wide as its sub-blocks, which are narrowed each by itself"
    return None


def _refusal(
    site: Site,
    inside: Sequence[Site],
    untreated: Mapping[str, str],
    calls: Mapping[str, Call],
) -> str | None:
    """Why a site has no width in heads or channels, from what is in it; None: it may have one."""
    for weight in inside:
        if weight.written_back:
            return f"{weight.name} is written back: its module's forward is not known"
        for member in weight.members:
            if member.module not in calls:
                return f"{member.module}: the batch does not reach it"
    below = (f"{path}: {why}" for path, why in untreated.items() if _is_below(path, site.name))
    return next(below, None)


def groups_below(site: str, inside: Iterable[Site]) -> Groups:
    """The members of weight sites in a structure site, with paths below it."""
    return tuple(
        tuple(replace(m, module=m.module.removeprefix(site).lstrip(".")) for m in weight.members)
        for weight in inside
    )


def likeness_of(module: nn.Module, kind: str, groups: Groups, call: Call) -> Any:
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


def find_width(module: nn.Module, kind: str, groups: Groups, call: Call) -> Found:
    """The widths of a sub-block, or why it has none; of several the one that saves most.

    Args:
        module: the sub-block.
        kind: that of its site.
        groups: its weights by what they are given, with paths below it.
        call: what it was given.

    Returns:
        Widths with paths below the sub-block, proven by execution; or the reasons.
    """
    run = runner(call)
    try:
        precise = in_float32(module)
        # What cannot be copied cannot be narrowed.
        shared_copy(precise)
    except (RuntimeError, TypeError) as failure:
        return Found(f"it cannot be copied ({failure})")
    try:
        dense, flow = run(precise), flow_of(precise, groups, run)
        try:
            found = list(couplings(precise, groups, flow))
        except RuntimeError as failure:
            return Found(f"torch cannot differentiate it ({failure})")
        proposed = [replace(w, unit=_unit(w, kind)) for w in found if isinstance(w, Width)]
        refuted = [reason for reason in found if isinstance(reason, str)]
        width = _proven(precise, proposed, refuted, dense, run)
        heads = [width for width in proposed if width.unit == "head"]
        values = _first([find_values(precise, each, dense, run) for each in heads])
        return Found(
            width, values, _first([find_query_keys(precise, each, dense, run) for each in heads])
        )
    except NotRun as failure:
        return Found(f"it cannot be run by itself ({failure})")


def _proven(
    module: nn.Module, proposed: Iterable[Width], others: Sequence[str], dense: Tensor, run: Run
) -> Width | str:
    """The first width that is no mistake, the largest first, or what is wrong with that."""
    refuted: list[str] = []
    undividable: list[str] = []
    for width in sorted(proposed, key=_narrowed_weights, reverse=True):
        if width.units == 1:
            undividable.append(
                undivided([cut.member.module for cut in width.cuts if cut.side == "out"])
            )
            continue
        reason = _refutation(module, width, dense, run)
        if reason is None:
            return width
        refuted.append(reason)
    reasons = [*refuted, *undividable, *others]
    return reasons[0] if reasons else "no layer in it takes what another layer in it gives"


def _first(found: Sequence[Width | str]) -> Width | str | None:
    """The first width in dimensions of heads, or why what seems to be heads has none."""
    return next((each for each in found if isinstance(each, Width)), found[0] if found else None)


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
    return difference(dense, expected, given)


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
