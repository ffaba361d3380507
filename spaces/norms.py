"""Finds the norms that one weight site alone reads, and proves it.

Nothing here lists models by name. If a layer W reads y = n(x) g + b, and nothing else does, then
g s, b s and W / s give the same for any s > 0 of one factor for each input. So a module whose
output is what a site's layers are given is changed in that way, by random factors, and the block
around it is run: where another layer, a router or the residual reads y too, something else comes
out. Norms that multiply by 1 + g are found by trying that too.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import permutations
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from apportion.spaces.activations import leaves
from apportion.spaces.folding import Norm
from apportion.spaces.layers import owners_of
from apportion.spaces.probing import Call
from apportion.spaces.sites import Member, Site
from apportion.spaces.trials import NotRun, Run, difference, in_float32, runner
from apportion.spaces.views import matrix_of, parameter_at
from apportion.spaces.widths import groups_below, likeness_of

OFFSETS = (0, 1)
"""That are tried: y = n(x) g, and y = n(x) (1 + g)."""
SHARE = 1e-3
"""Of the change that the factors make: what may be left when they are undone. A second reader
that matters a thousandth as much as the first one is noticed."""


@torch.no_grad()
def with_norms(
    model: nn.Module, blocks: Sequence[Site], weights: Sequence[Site], calls: Mapping[str, Call]
) -> list[Site]:
    """The weight sites, those that alone read a norm of their block with it.

    Of like blocks one is tried.

    Args:
        model: the model.
        blocks: its blocks.
        weights: its weight sites.
        calls: what each module was given and returned.
    """
    owners = owners_of(model)
    known: dict[Any, dict[int, Norm]] = {}
    found: dict[str, Norm] = {}
    for block in blocks:
        inside = [site for site in weights if _is_layer_below(site, block, calls)]
        module, call = model.get_submodule(block.name), calls[block.name]
        likeness = likeness_of(module, block.kind, groups_below(block.name, inside), call)
        if likeness not in known:
            below = {p.removeprefix(f"{block.name}."): c for p, c in calls.items()}
            known[likeness] = _norms_of(module, block.name, inside, call, below)
        for place, norm in known[likeness].items():
            there = replace(norm, module=f"{block.name}.{norm.module}")
            if all(owners[id(parameter_at(model, path))] == 1 for path in there.paths):
                found[inside[place].name] = there
    return [replace(site, norm=found.get(site.name)) for site in weights]


def _is_layer_below(site: Site, block: Site, calls: Mapping[str, Call]) -> bool:
    """Whether all of a weight site is layers in a block that were called."""
    paths = [member.module for member in site.members]
    return not site.written_back and all(
        path.startswith(f"{block.name}.") and path in calls for path in paths
    )


def _norms_of(
    module: nn.Module, name: str, inside: Sequence[Site], call: Call, calls: Mapping[str, Call]
) -> dict[int, Norm]:
    """Place among a block's weight sites -> the norm that it alone reads; paths below the block.

    Args:
        module: the block.
        name: its path.
        inside: its weight sites.
        call: what it was given.
        calls: what modules were given, by their paths below the block.
    """
    given = {
        place: list(_given_by(module, members, calls))
        for place, members in enumerate(groups_below(name, inside))
    }
    found: dict[int, Norm] = {}
    if not any(given.values()):
        return found
    try:
        precise, run = in_float32(module), runner(call)
        for place, members in enumerate(groups_below(name, inside)):
            norms = (n for p in given[place] for n in _forms(precise, p, calls[p]))
            proven = (norm for norm in norms if _is_read_alone(precise, norm, members, run))
            if (norm := next(proven, None)) is not None:
                found[place] = norm
    except (NotRun, RuntimeError, TypeError):  # a block that cannot be copied, or run by itself
        return {}
    return found


def _given_by(
    module: nn.Module, members: Sequence[Member], calls: Mapping[str, Call]
) -> Iterator[str]:
    """Paths of the modules with nothing but vectors whose output is what the members are given."""
    given, inputs = calls[members[0].module].input, members[0].shape.in_features
    for path, part in module.named_modules():
        call, vectors = calls.get(path), list(part.parameters(recurse=False))
        if call is None or call.count > 1 or not 0 < len(vectors) < 3:
            continue
        output = call.output
        if isinstance(output, Tensor) and output.data_ptr() == given.data_ptr():
            fits = all(v.shape == (inputs,) and v.is_floating_point() for v in vectors)
            if fits and output.numel() == given.numel() > 0:
                yield path


def _forms(module: nn.Module, path: str, call: Call) -> Iterator[Norm]:
    """What may be the gain of a module, and how it multiplies: at 0 no input comes through."""
    part, run = module.get_submodule(path), runner(call)
    own = dict(part.named_parameters(recurse=False))
    for names in permutations(own):
        for offset in OFFSETS:
            without = {names[0]: torch.full_like(own[names[0]], -offset)}
            output = run(lambda *a, w=without, **k: functional_call(part, w, a, k))
            rows = output.reshape(-1, output.shape[-1])
            if bool((rows == rows[0]).all()):
                yield Norm(path, names, offset)


def _is_read_alone(module: nn.Module, norm: Norm, members: Sequence[Member], run: Run) -> bool:
    """Whether a norm may be scaled for its members alone: undone in their weights, nothing changes.

    Its vectors are others than the model's, whose biases may be zeros: what is found holds for the
    code, and so for like blocks.
    """
    generator = torch.Generator().manual_seed(0)
    vectors = {path: parameter_at(module, path).detach() for path in norm.paths}
    size = next(iter(vectors.values())).shape
    noise = (torch.randn(size, generator=generator) / 4 for _ in vectors)
    before = {path: v + n.to(v) for (path, v), n in zip(vectors.items(), noise, strict=True)}
    factors = 2 ** (2 * torch.rand(size, generator=generator) - 1)
    offsets = (norm.offset, *[0] * (len(vectors) - 1))
    after = {
        path: (v + offset) * factors.to(v) - offset
        for (path, v), offset in zip(before.items(), offsets, strict=True)
    }
    undone: dict[str, Tensor] = {}
    for member in members:
        weight = parameter_at(module, member.parameter_path).detach().contiguous().clone()
        matrix_of(weight, member).div_(factors.to(weight))
        undone[member.parameter_path] = weight

    def given(tensors: dict[str, Tensor]) -> Tensor:
        return run(lambda *a, **k: _all_of(functional_call(module, tensors, a, k)))

    expected, changed, both = given(before), given(after), given(after | undone)
    if difference(changed, expected, both) is not None:
        return False
    return bool((both - expected).norm() <= SHARE * (changed - expected).norm())


def _all_of(output: Any) -> Tensor:
    """All numbers that a block returns, not only those that it hands on."""
    return torch.cat([tensor.flatten().float() for tensor in leaves(output)])
