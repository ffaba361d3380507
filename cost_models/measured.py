"""Times one request item: operators and structure, in milliseconds of the dense model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from apportion.cost_models.harness import Call, Measurement
from apportion.cost_models.operators import (
    Given,
    Operator,
    Program,
    built_layers,
    candidate_programs,
    copies_of,
    observe,
    original_layers,
    original_operator,
    rotation,
    round_of,
)
from apportion.cost_models.requests import RequestItem, runner
from apportion.cost_models.session import Session, Subject
from apportion.cost_models.whole_model import configured, signature, whole_description, without
from apportion.spaces.batches import Batch
from apportion.spaces.grammar import Option
from apportion.spaces.sites import Member, Site
from apportion.spaces.space import DENSE, Space

DROPPED_SHARE = 2
"""Every so manieth of like structures is dropped to learn what one of them takes."""


@dataclass(frozen=True)
class Context:
    """What is measured, and how: the dense model, its space, and the sitting.

    `footprint` is the bytes of weights that an operator's own must be as cold as.
    """

    model: nn.Module
    space: Space
    sample: Batch
    threads: int
    rank_multiple: int
    footprint: float
    model_bytes: float
    session: Session


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
        model: signature of the dense model.
    """

    item: RequestItem
    originals: dict[int, Program]
    candidates: dict[tuple[int, int], list[Program]]
    layers: dict[str, Layers]
    structures: dict[int, str]
    alternatives: dict[tuple[int, int], str]
    model: str

    @property
    def operators(self) -> dict[str, Operator]:
        """All distinct operators by key, the model's own layers included."""
        programs = [*self.originals.values(), *(p for row in self.candidates.values() for p in row)]
        return {operator.key: operator for program in programs for operator in program}

    def description(self, operators: Sequence[str], dropped: Sequence[str]) -> dict[str, Any]:
        """Of a whole model in which these operators run and these structures are dropped."""
        threads = next((each.operator.threads for each in self.layers.values()), 0)
        return whole_description(self.model, self.item, threads, operators, dropped)


@dataclass(frozen=True)
class ItemTimes:
    """Milliseconds of one request item: of the dense model, of operators, and of structures.

    Attributes:
        plan: what was timed.
        dense: the dense model.
        operators: key -> mean and upper.
        savings: place of a structure site -> what the model is faster without it.
        dropped: places that were dropped together -> the model without them.
        added: (choice block, option) -> what the model is slower with that alternative than with
            the first; negative where it is faster.
        widths: half widths of the operators' intervals, relative.
    """

    plan: ItemPlan
    dense: float
    operators: dict[str, tuple[float, float]]
    savings: dict[int, float]
    dropped: dict[tuple[int, ...], float]
    added: dict[tuple[int, int], float]
    widths: tuple[float, ...]


def plan_item(context: Context, item: RequestItem) -> ItemPlan:
    """Run the model once to see what its layers are given, and list what that takes to time."""
    model, space = context.model, context.space
    given = observe(model, space, runner(model, item, context.sample))
    originals: dict[int, Program] = {}
    candidates: dict[tuple[int, int], list[Program]] = {}
    layers: dict[str, Layers] = {}
    for place, site in enumerate(space.sites):
        launched = [o for o in enumerate(space.options[place]) if _launches(site, o[1])]
        seen = [given[group[0].module] for group in site.groups if group[0].module in given]
        if not launched or len(seen) < len(site.groups):
            continue
        own = [
            Layers(group, original_operator(model, group, each, context.threads))
            for group, each in zip(site.groups, seen, strict=True)
        ]
        originals[place] = tuple(each.operator for each in own)
        for each in own:
            layers.setdefault(each.operator.key, each)
        for number, option in launched:
            candidates[place, number] = candidate_programs(
                model, site, option, seen, context.threads, context.rank_multiple
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
    return ItemPlan(item, originals, candidates, layers, structures, alternatives, signature(model))


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


def measure_item(context: Context, plan: ItemPlan) -> ItemTimes:
    """Time the plan's operators and structures."""
    dense, layers = _against_model(context, plan)
    times: dict[str, tuple[float, float]] = {}
    widths: list[float] = []
    for operator in (each.operator for each in plan.layers.values()):
        own = layers[operator.key]
        times[operator.key] = (own.ratio * dense, own.high * dense)
        rivals = _rivals(plan, operator)
        for rival, measured in zip(rivals, _against_layers(context, plan, operator, rivals),
                                   strict=True):  # fmt: skip
            mean = measured.ratio * own.ratio * dense
            times[rival.key] = (mean, mean * (measured.high / measured.ratio))
            widths.append((measured.high - measured.low) / (2 * measured.ratio))
    likes, dropped = _without_some(context, plan, dense)
    savings = {
        place: (dense - milliseconds) / len(some)
        for places, (some, milliseconds) in zip(likes, dropped.items(), strict=True)
        for place in places
    }
    added = _with_alternatives(context, plan, dense)
    return ItemTimes(plan, dense, times, savings, dropped, added, tuple(widths))


def _rivals(plan: ItemPlan, original: Operator) -> list[Operator]:
    """All distinct operators that could run in place of some layers."""
    found = {
        operator.key: operator
        for (site, _), row in plan.candidates.items()
        for program in row
        for own, operator in zip(plan.originals[site], program, strict=True)
        if own.key == original.key
    }
    return list(found.values())


def _against_model(context: Context, plan: ItemPlan) -> tuple[float, dict[str, Measurement]]:
    """The dense model's milliseconds, and each distinct site's own layers as a share of it."""
    session, model = context.session, context.model
    dense = Subject(plan.description([], []), lambda: runner(model, plan.item, context.sample))
    subjects = [_layers_subject(context, plan, layers) for layers in plan.layers.values()]
    seconds = session.timing.model_seconds if session.timing else 0.0
    found = session.measure([dense, *subjects], dense.build, seconds, context.footprint)
    copies = [copies_of(each.operator, context.footprint) for each in plan.layers.values()]
    shares = {
        key: _scaled(measured, 1 / count)
        for key, measured, count in zip(plan.layers, found[1:], copies, strict=True)
    }
    return found[0].reference_milliseconds, shares


def _scaled(measured: Measurement, by: float) -> Measurement:
    return Measurement(
        measured.ratio * by, measured.low * by, measured.high * by,
        measured.milliseconds * by, measured.pairs, measured.stopped_by,
    )  # fmt: skip


def _layers_subject(context: Context, plan: ItemPlan, layers: Layers) -> Subject:
    """All copies of the model's own layers, timed against the dense model."""
    operator = layers.operator
    copies = copies_of(operator, context.footprint)

    def build() -> Call:
        return round_of(original_layers(context.model, layers.members, copies), operator.given)

    work = plan.description([], [])
    return Subject({**operator.description, "copies": copies, "against": work}, build)


def _against_layers(
    context: Context, plan: ItemPlan, original: Operator, rivals: list[Operator]
) -> list[Measurement]:
    """Operators against the layers that they replace."""
    session = context.session
    copies = copies_of(original, context.footprint)
    members = plan.layers[original.key].members

    def reference() -> Call:
        return rotation(original_layers(context.model, members, copies), original.given)

    def subject(operator: Operator) -> Subject:
        described = {**operator.description, "copies": copies, "against": original.description}
        return Subject(
            described,
            lambda: rotation(built_layers(operator, copies, session.seed), operator.given),
        )

    seconds = session.timing.operator_seconds if session.timing else 0.0
    subjects = [subject(operator) for operator in rivals]
    return session.measure(subjects, reference, seconds, context.footprint)


def _without_some(
    context: Context, plan: ItemPlan, dense: float
) -> tuple[list[list[int]], dict[tuple[int, ...], float]]:
    """Like structures, and the milliseconds of the model without some of each kind.

    Several are dropped at once, because one small sub-block is lost in the noise of a whole model.
    """
    likes: dict[str, list[int]] = {}
    for place, name in plan.structures.items():
        likes.setdefault(name, []).append(place)
    dropped = [tuple(places[::DROPPED_SHARE]) for places in likes.values()]
    session, sites = context.session, context.space.sites

    def subject(places: tuple[int, ...]) -> Subject:
        def build() -> Call:
            model = without(context.model, [sites[place] for place in places])
            return runner(model, plan.item, context.sample)

        return Subject(plan.description([], [plan.structures[p] for p in places]), build)

    found = session.measure(
        [subject(places) for places in dropped],
        lambda: runner(context.model, plan.item, context.sample),
        session.timing.model_seconds if session.timing else 0.0,
        context.model_bytes,
    )
    times = {some: dense * m.ratio for some, m in zip(dropped, found, strict=True)}
    return list(likes.values()), times


def _with_alternatives(
    context: Context, plan: ItemPlan, dense: float
) -> dict[tuple[int, int], float]:
    """What each alternative adds to the dense model's milliseconds; like ones switch together."""
    likes: dict[str, list[tuple[int, int]]] = {}
    for place, name in plan.alternatives.items():
        likes.setdefault(name, []).append(place)
    switched = [tuple(places[::DROPPED_SHARE]) for places in likes.values()]
    session, space = context.session, context.space

    def subject(places: tuple[tuple[int, int], ...]) -> Subject:
        def build() -> Call:
            chosen = {space.sites[site].name: space.texts[site][option] for site, option in places}
            model = configured(context.model, space, chosen, {}, context.rank_multiple)
            return runner(model, plan.item, context.sample)

        return Subject(plan.description([plan.alternatives[p] for p in places], []), build)

    found = session.measure(
        [subject(places) for places in switched],
        lambda: runner(context.model, plan.item, context.sample),
        session.timing.model_seconds if session.timing else 0.0,
        context.model_bytes,
    )
    return {
        place: dense * (measured.ratio - 1) / len(some)
        for places, some, measured in zip(likes.values(), switched, found, strict=True)
        for place in places
    }
