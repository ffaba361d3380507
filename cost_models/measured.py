"""Times one request item: operators and structure, in milliseconds of the dense model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from apportion.cost_models.harness import Call, Measurement
from apportion.cost_models.operators import (
    Given,
    Operator,
    built_layers,
    candidate_operators,
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
from apportion.spaces.sites import Site
from apportion.spaces.space import DROP, Space

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
class ItemPlan:
    """What has to be timed for one request item.

    Attributes:
        item: the work.
        originals: place of a weight site -> its own layers.
        candidates: (site, option) -> one operator for each implementation that serves it.
        structures: place of a structure site -> its signature.
        alternatives: (choice block, option) -> name of the alternative, the same where both the
            blocks and what they are given are alike.
        model: signature of the dense model.
    """

    item: RequestItem
    originals: dict[int, Operator]
    candidates: dict[tuple[int, int], list[Operator]]
    structures: dict[int, str]
    alternatives: dict[tuple[int, int], str]
    model: str

    @property
    def operators(self) -> dict[str, Operator]:
        """All distinct operators by key, the model's own layers included."""
        every = [*self.originals.values(), *(o for row in self.candidates.values() for o in row)]
        return {operator.key: operator for operator in every}

    def description(self, operators: Sequence[str], dropped: Sequence[str]) -> dict[str, Any]:
        """Of a whole model in which these operators run and these structures are dropped."""
        threads = next((o.threads for o in self.originals.values()), 0)
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
    originals: dict[int, Operator] = {}
    candidates: dict[tuple[int, int], list[Operator]] = {}
    for place, site in enumerate(space.sites):
        if site.is_structure or site.name not in given:
            continue
        seen = given[site.name]
        originals[place] = original_operator(model, site, seen, context.threads)
        for number, option in enumerate(space.options[place][1:], 1):
            candidates[place, number] = candidate_operators(
                model, site, option, seen, context.threads, context.rank_multiple
            )
    structures = {
        place: signature(model.get_submodule(site.name), _given_below(space, site, given))
        for place, site in enumerate(space.sites)
        if DROP in space.texts[place]
    }
    alternatives = {
        (place, number): f"{signature(model.get_submodule(site.name), [given[site.name]])}:{text}"
        for place, site in enumerate(space.sites)
        if site.choices and site.name in given
        for number, text in enumerate(space.texts[place][1:], 1)
    }
    return ItemPlan(item, originals, candidates, structures, alternatives, signature(model))


def _given_below(space: Space, structure: Site, given: dict[str, Given]) -> list[Given]:
    return [
        given[site.name]
        for site in space.sites
        if site.name in given and site.members
        if site.members[0].module.startswith(structure.name + ".")
    ]


def measure_item(context: Context, plan: ItemPlan) -> ItemTimes:
    """Time the plan's operators and structures."""
    dense, layers = _against_model(context, plan)
    times: dict[str, tuple[float, float]] = {}
    widths: list[float] = []
    for operator in {o.key: o for o in plan.originals.values()}.values():
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
        if plan.originals[site].key == original.key
        for operator in row
    }
    return list(found.values())


def _against_model(context: Context, plan: ItemPlan) -> tuple[float, dict[str, Measurement]]:
    """The dense model's milliseconds, and each distinct site's own layers as a share of it."""
    session, model = context.session, context.model
    distinct = {operator.key: place for place, operator in plan.originals.items()}
    dense = Subject(plan.description([], []), lambda: runner(model, plan.item, context.sample))
    subjects = [_layers_subject(context, plan, place) for place in distinct.values()]
    seconds = session.timing.model_seconds if session.timing else 0.0
    found = session.measure([dense, *subjects], dense.build, seconds, context.footprint)
    copies = [copies_of(plan.originals[p], context.footprint) for p in distinct.values()]
    shares = {
        key: _scaled(measured, 1 / count)
        for key, measured, count in zip(distinct, found[1:], copies, strict=True)
    }
    return found[0].reference_milliseconds, shares


def _scaled(measured: Measurement, by: float) -> Measurement:
    return Measurement(
        measured.ratio * by, measured.low * by, measured.high * by,
        measured.milliseconds * by, measured.pairs, measured.stopped_by,
    )  # fmt: skip


def _layers_subject(context: Context, plan: ItemPlan, place: int) -> Subject:
    """All copies of a site's own layers, timed against the dense model."""
    operator, site = plan.originals[place], context.space.sites[place]
    copies = copies_of(operator, context.footprint)

    def build() -> Call:
        return round_of(original_layers(context.model, site, operator, copies), operator.given)

    work = plan.description([], [])
    return Subject({**operator.description, "copies": copies, "against": work}, build)


def _against_layers(
    context: Context, plan: ItemPlan, original: Operator, rivals: list[Operator]
) -> list[Measurement]:
    """Operators against the layers that they replace."""
    session = context.session
    copies = copies_of(original, context.footprint)
    place = next(p for p, o in plan.originals.items() if o.key == original.key)
    site = context.space.sites[place]

    def reference() -> Call:
        return rotation(original_layers(context.model, site, original, copies), original.given)

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
            model = without(context.model, context.space, [sites[place] for place in places])
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
