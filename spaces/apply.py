"""Puts a configuration into a live model: packed operators in place of layers, nothing or a
constant in place of what is dropped, narrower sub-blocks in place of treated ones, one alternative
of each choice block, packed keys and values in caches, and realized weights as parameters where a
module's forward is not known."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from apportion.errors import ApportionError
from apportion.kernels.formats import StoredWeight
from apportion.kernels.group import members as group_members
from apportion.kernels.reference import reference_weight
from apportion.kernels.registry import implementation
from apportion.spaces.caches import attention_of, pack_cache
from apportion.spaces.choice import OPERATION, choice_at
from apportion.spaces.grammar import Option
from apportion.spaces.narrowing import narrowed_copy
from apportion.spaces.padding import DENSE_DTYPES, in_zeros, pad_heads, paddings, served_by
from apportion.spaces.parts import treated_site
from apportion.spaces.sites import Member, Site, Width
from apportion.spaces.space import DENSE, DROP_MEAN, Space
from apportion.spaces.stored import Stored, StoredSite
from apportion.spaces.views import matrix_of, parameter_at, set_parameter, written

WRITTEN_BACK = "written back"
"""In place of an implementation's name, where realized weights become a module's parameters."""


class Dropped(nn.Module):
    """Stands where a sub-block or block was and does nothing, or adds a constant.

    It returns its input where the sub-block added its own residual, zeros otherwise, with the
    constant added where there is one, in the form that the caller expects. Where a key-value cache
    is handed in, the dropped layer's entry grows by keys of one channel, because models read the
    sequence length from the cache's first layer.
    """

    constant: Tensor | None

    def __init__(self, site: Site, replaced: nn.Module, constant: Tensor | None = None) -> None:
        """Takes the module's place; a constant has the shape `Site.constant`."""
        super().__init__()
        self.site = site
        self.register_buffer("constant", constant)
        self.layer_indices = [
            index
            for module in replaced.modules()
            if isinstance(index := getattr(module, "layer_idx", None), int)
        ][:1]
        for name, value in vars(replaced).items():
            # Models read such attributes of their blocks ("attention_type" in Qwen).
            if isinstance(value, str | int | float) and not hasattr(self, name):
                setattr(self, name, value)

    def forward(self, *args: Any, **keywords: Any) -> Any:
        """Return what the dropped module would have returned, had it added nothing else."""
        given = (*args, *keywords.values())
        hidden = next(a for a in given if isinstance(a, Tensor))
        cache = next((a for a in given if hasattr(a, "get_seq_length")), None)
        if cache is not None:
            keys = hidden.new_zeros(hidden.shape[0], 1, hidden.shape[1], 1)
            for index in self.layer_indices:
                cache.update(keys, keys, index)
        output = hidden if self.site.residual_inside else torch.zeros_like(hidden)
        if self.constant is not None:
            output = output + self.constant.to(output)
        if self.site.output == "tuple":
            return (output, *[None] * (self.site.output_length - 1))
        return output


def drop(model: nn.Module, site: Site, constant: Tensor | None = None) -> None:
    """Replace a structure site's module by nothing, or by a constant that is added, in place."""
    model.set_submodule(site.name, Dropped(site, model.get_submodule(site.name), constant))


def constant_of(site: Site, option: Option, stored: Stored) -> Tensor | None:
    """What is added in place of a dropped site; None: nothing, by `drop`."""
    if str(option) != DROP_MEAN:
        return None
    constant = stored(site, option).constant
    if constant is None:
        raise ApportionError(f"what is stored of {site.name} holds no constant")
    return constant


def member_weight(model: nn.Module, member: Member) -> Tensor:
    """The dense weight of a member as a matrix `[out, in]`.

    Raises:
        TypeError: the module holds no such weight.
    """
    return matrix_of(parameter_at(model, member.parameter_path), member)


def bias_of(model: nn.Module, module: str) -> Tensor | None:
    """The bias `[out]` of a layer, or None."""
    bias = getattr(model.get_submodule(module), "bias", None)
    return bias if isinstance(bias, Tensor) else None


def install(
    model: nn.Module,
    modules: Sequence[str],
    stored: Sequence[StoredWeight],
    biases: Sequence[Tensor | None],
    implementation_name: str,
) -> None:
    """Put one operator that serves all members in the place of their layers, in place."""
    operator = implementation(implementation_name).build(stored, biases)
    for path, member in zip(modules, group_members(operator, len(modules)), strict=True):
        model.set_submodule(path, member)


def install_groups(
    model: nn.Module,
    groups: Sequence[Sequence[Member]],
    stored: Sequence[StoredWeight],
    implementation_name: str,
) -> None:
    """Put operators in the place of layers, one for each group of those that share an input."""
    weights = iter(stored)
    for group in groups:
        modules = [member.module for member in group]
        biases = [bias_of(model, module) for module in modules]
        install(model, modules, [next(weights) for _ in group], biases, implementation_name)


def write_back(model: nn.Module, members: Sequence[Member], stored: Sequence[StoredWeight]) -> None:
    """Make what is stored the values of the members' parameters; shared ones stay as they are."""
    paths = {member.parameter_path for member in members}
    dense = {path: parameter_at(model, path) for path in paths}
    for path, values in written(dense, members, [reference_weight(s) for s in stored]).items():
        set_parameter(model, path, values)


def treat(
    model: nn.Module, site: Site, stored: StoredSite, implementation_name: str | None
) -> None:
    """Put a narrower sub-block with packed operators in the place of a sub-block, in place.

    The site's width is what the option leaves less of (`parts.treated_site`).
    What is left of experts is written back; all else needs an implementation.
    """
    if stored.kept is None:
        raise ApportionError(f"what is stored of {site.name} does not say which units it keeps")
    narrow = narrowed_copy(model, site, stored.kept, stored.biases)
    model.set_submodule(site.name, narrow)
    if site.width is not None and site.has_experts:
        write_back(model, site.width.members(len(stored.kept)), stored.weights)
    elif site.width is None or implementation_name is None:
        raise ApportionError(f"nothing serves what is stored of {site.name}")
    else:
        install_narrow(model, site.width, stored.kept, stored.weights, implementation_name)


def install_narrow(
    model: nn.Module,
    width: Width,
    kept: Sequence[int],
    stored: Sequence[StoredWeight],
    implementation_name: str,
) -> None:
    """Put operators in the place of a narrower sub-block's layers, in place.

    Args:
        model: with the narrower sub-block.
        width: what it is narrower by, not in experts.
        kept: numbers of the units that stay, ascending.
        stored: of each cut of the width.
        implementation_name: may end in `padding.ZEROS`.
    """
    groups = [[cut.member for cut in group] for group in width.groups]
    name = served_by(implementation_name)
    if name == implementation_name:
        install_groups(model, groups, stored, name)
        pad_heads(model, width, kept)
        return
    padding, weights = paddings(width, kept), iter(stored)
    for group in groups:
        modules = [member.module for member in group]
        whole, biases = in_zeros(
            [next(weights) for _ in group],
            [bias_of(model, module) for module in modules],
            [padding.get(member) for member in group],
            DENSE_DTYPES[name],
        )
        install(model, modules, whole, biases, name)


def chosen_alternatives(space: Space, configuration: Mapping[str, str]) -> dict[str, str]:
    """Path of each choice block that is not under a dropped site -> name of what runs there."""
    config = space.config(configuration)
    return {
        site.name: configuration[site.name].removeprefix(OPERATION)
        for place, site in enumerate(space.sites)
        if site.choices and not space.void(config, place)
    }


def apply(
    model: nn.Module,
    space: Space,
    configuration: Mapping[str, str],
    stored: Stored,
    implementations: Mapping[str, Mapping[str, str]],
) -> None:
    """Realize a configuration in `model`, in place; what it names dense is left untouched.

    A choice block holds only what was chosen.

    Args:
        model: the dense model.
        space: the space that the configuration belongs to.
        configuration: site name -> option text; sites left out stay neutral.
        stored: gives what is stored of a site under an option.
        implementations: site name -> option text -> name of the implementation that serves it;
            what is written back needs none, nor does a constant.
    """
    canonical = space.canonical(configuration)
    config = space.config(canonical)
    for path, name in chosen_alternatives(space, canonical).items():
        choice_at(model, path).settle(name)
    for place, site in enumerate(space.sites):
        text = canonical[site.name]
        option = space.options[place][config[place]]
        if text == DENSE or space.void(config, place):
            continue
        if option.narrows:
            operator = None if site.has_experts else implementations[site.name][text]
            treat(model, treated_site(site, option), stored(site, option), operator)
        elif site.cache is not None and option.cache_bits:
            pack_cache(model, attention_of(site), site.cache, option)
        elif site.is_structure:
            continue
        elif site.written_back:
            write_back(model, site.members, stored(site, option).weights)
        else:
            found = stored(site, option)
            install_groups(model, site.groups, found.weights, implementations[site.name][text])
            for path, vector in found.vectors(site).items():
                set_parameter(model, path, vector)
    for place, site in enumerate(space.sites):
        # A sub-block under a dropped block is gone with it: the canonical option is keep there.
        option = space.options[place][config[place]]
        if option.drops:
            drop(model, site, constant_of(site, option, stored))
