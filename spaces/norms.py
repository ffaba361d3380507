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
    groups = groups_below(name, inside)
    given = [list(_given_by(module, members, calls)) for members in groups]
    if not any(given):
        return {}
    try:
        precise = in_float32(module)
    except (RuntimeError, TypeError):  # what cannot be copied is not tried
        return {}
    run, found = runner(call), dict[int, Norm]()
    for place, (paths, members) in enumerate(zip(given, groups, strict=True)):
        norms = (norm for path in paths for norm in _forms(precise, path, calls[path]))
        proven = (norm for norm in norms if _is_read_alone(precise, norm, members, run))
        if (norm := next(proven, None)) is not None:
            found[place] = norm
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
            output = _output(part, without, run)
            if output is None:
                return
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

    expected, changed, both = (
        _output(module, tensors, run) for tensors in (before, after, after | undone)
    )
    if expected is None or changed is None or both is None:
        return False
    if difference(changed, expected, both) is not None:
        return False
    return bool((both - expected).norm() <= SHARE * (changed - expected).norm())


def _output(module: nn.Module, tensors: Mapping[str, Tensor], run: Run) -> Tensor | None:
    """All numbers that a module returns, not only those that it hands on; None: it fails.

    As they are shaped where they are one tensor.
    """

    def forward(*args: Any, **keywords: Any) -> Tensor:
        found = leaves(functional_call(module, dict(tensors), args, keywords))
        return found[0] if len(found) == 1 else torch.cat([each.flatten() for each in found])

    try:
        return run(forward)
    except NotRun:
        return None
