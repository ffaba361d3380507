"""What has to be timed for one request item: its operators, structures and alternatives."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from apportion.cost_models.cache_work import CacheWork, cache_works
from apportion.cost_models.expert_loads import Shares, expected_loads, expert_shares, like_modules
from apportion.cost_models.operators import (
    Given,
    Operator,
    Program,
    candidate_programs,
    observe,
    original_operator,
)
from apportion.cost_models.requests import RequestItem, runner
from apportion.cost_models.session import Session
from apportion.cost_models.whole_model import signature, whole_description
from apportion.spaces.batches import Batch, call
from apportion.spaces.caches import attention_of
from apportion.spaces.grammar import Option
from apportion.spaces.sites import Member, Site
from apportion.spaces.space import DENSE, DROP_MEAN, Space


@dataclass(frozen=True)
class Context:
    """What is measured, and how: the dense model, its space, and the sitting.

    `footprint` is the bytes of weights that an operator's own must be as cold as, `shares` tells
    what listed experts are given of the tokens in the study's data.
    """

    model: nn.Module
    space: Space
    sample: Batch
    threads: int
    rank_multiple: int
    footprint: float
    model_bytes: float
    session: Session
    shares: Shares


@dataclass(frozen=True)
class Layers:
    """Layers of the model that share an input, and what they launch."""

    members: tuple[Member, ...]
    operator: Operator


@dataclass(frozen=True)
class ItemPlan:
    """What has to be timed for one request item.

    Attributes:
        item: the work.
        originals: place of a weight site or of a sub-block with treatments -> its own layers.
        candidates: (site, option) -> one program for each implementation that serves it.
        layers: key of an operator among the originals -> the first layers that are like it.
        structures: place of a structure site -> its signature.
        alternatives: (choice block, option) -> name of the alternative, the same where both the
            blocks and what they are given are alike.
        constants: (structure site, option) -> what a constant is added to in its place.
        active: place of a weight site of a listed expert -> share of the steps that run it.
        model: signature of the dense model.
        caches: (cache, option) -> what packing is to one layer.
    """

    item: RequestItem
    originals: dict[int, Program]
    candidates: dict[tuple[int, int], list[Program]]
    layers: dict[str, Layers]
    structures: dict[int, str]
    alternatives: dict[tuple[int, int], str]
    constants: dict[tuple[int, int], Given]
    active: dict[int, float]
    model: str
    caches: dict[tuple[int, int], CacheWork] = field(default_factory=dict)

    @property
    def cache_works(self) -> list[CacheWork]:
        """All distinct ones, and what the dense model does in their place."""
        pairs = ((work, work.unpacked) for work in self.caches.values())
        alike = {work.key: work for pair in pairs for work in pair if work is not None}
        return list(alike.values())

    @property
    def operators(self) -> dict[str, Operator]:
        """All distinct operators by key, the model's own layers included."""
        programs = [*self.originals.values(), *(p for row in self.candidates.values() for p in row)]
        return {operator.key: operator for program in programs for operator in program}

    def description(self, operators: Sequence[str], dropped: Sequence[str]) -> dict[str, Any]:
        """Of a whole model in which these operators run and these structures are dropped."""
        threads = next((each.operator.threads for each in self.layers.values()), 0)
        return whole_description(self.model, self.item, threads, operators, dropped)


def plan_item(context: Context, item: RequestItem) -> ItemPlan:
    """Run the model once to see what its layers are given, and list what that takes to time."""
    model, space = context.model, context.space
    seen = observed(model, space, runner(model, item, context.sample))
    firsts = {group[0].module for site in space.sites for group in site.groups}
    given, active = expected_loads(like_modules(model), context.shares, seen, sorted(firsts))
    originals: dict[int, Program] = {}
    candidates: dict[tuple[int, int], list[Program]] = {}
    layers: dict[str, Layers] = {}
    for place, site in enumerate(space.sites):
        launched = [o for o in enumerate(space.options[place]) if _launches(site, o[1])]
        inputs = [given[group[0].module] for group in site.groups if group[0].module in given]
        if not launched or site.has_experts or len(inputs) < len(site.groups):
            continue
        own = [
            Layers(group, original_operator(model, group, each, context.threads))
            for group, each in zip(site.groups, inputs, strict=True)
        ]
        originals[place] = tuple(each.operator for each in own)
        for each in own:
            layers.setdefault(each.operator.key, each)
        for number, option in launched:
            candidates[place, number] = candidate_programs(
                model, site, option, inputs, context.threads, context.rank_multiple
            )
    structures = {
        place: signature(model.get_submodule(site.name), _given_below(space, site, given))
        for place, site in enumerate(space.sites)
        if any(space.voiding[place])
    }
    alternatives = {
        (place, number): f"{signature(model.get_submodule(site.name), [given[site.name]])}:{text}"
        for place, site in enumerate(space.sites)
        if site.choices and site.name in given
        for number, text in enumerate(space.texts[place][1:], 1)
    }
    often = {
        place: active[site.members[0].module]
        for place, site in enumerate(space.sites)
        if site.members and site.members[0].module in active
    }
    constants, whole = _constants(space, given), signature(model)
    caches = cache_works(space, item, seen)
    return ItemPlan(
        item, originals, candidates, layers, structures, alternatives, constants, often, whole,
        caches,
    )  # fmt: skip


def observed(model: nn.Module, space: Space, run: Callable[[], object]) -> dict[str, Given]:
    """What `observe` sees, and what modules of lists, those that hold the lists, and attention
    whose cache is a site are given."""
    lists = like_modules(model)
    cached = [attention_of(site) for site in space.sites if site.cache is not None]
    return observe(model, space, run, (*lists, *lists.values(), *cached))


def shares_of(model: nn.Module, space: Space, sample: Batch) -> Shares:
    """What listed experts are given of a batch's tokens; nothing is run where there is no list."""
    lists = like_modules(model)
    if not lists:
        return {}
    with torch.no_grad():
        return expert_shares(lists, observed(model, space, lambda: call(model, sample)))


def _constants(space: Space, given: dict[str, Given]) -> dict[tuple[int, int], Given]:
    return {
        (place, row.index(DROP_MEAN)): given[site.name]
        for place, (site, row) in enumerate(zip(space.sites, space.texts, strict=True))
        if DROP_MEAN in row and site.name in given
    }


def _launches(site: Site, option: Option) -> bool:
    """Whether an option puts other operators in the place of a site's layers."""
    return option.narrows or not (site.is_structure or str(option) == DENSE)


def _given_below(space: Space, structure: Site, given: dict[str, Given]) -> list[Given]:
    return [
        given[site.members[0].module]
        for site in space.sites
        if site.members and site.members[0].module in given
        if site.members[0].module.startswith(structure.name + ".")
    ]
