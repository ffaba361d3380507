"""Times one request item: operators and structure, in milliseconds of the dense model."""

from dataclasses import dataclass

from apportion.cost_models.cache_work import CacheWork
from apportion.cost_models.harness import Call, Measurement
from apportion.cost_models.operators import (
    Given,
    Operator,
    built_layers,
    copies_of,
    original_layers,
    rotation,
    round_of,
    sum_with,
)
from apportion.cost_models.planning import Context, ItemPlan, Layers
from apportion.cost_models.requests import runner
from apportion.cost_models.session import Subject
from apportion.cost_models.whole_model import configured, without

DROPPED_SHARE = 2
"""Every so manieth of like structures is dropped to learn what one of them takes."""


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
            the first; negative where it is faster. (structure site, `drop:mean`) -> what adding
            the constant takes. (cache, option) -> what packing takes more than the dense cache.
        widths: half widths of the operators' intervals, relative.
    """

    plan: ItemPlan
    dense: float
    operators: dict[str, tuple[float, float]]
    savings: dict[int, float]
    dropped: dict[tuple[int, ...], float]
    added: dict[tuple[int, int], float]
    widths: tuple[float, ...]


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
    added = {**_with_alternatives(context, plan, dense), **_with_constants(context, plan, dense)}
    added |= _with_caches(context, plan, dense)
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


def _with_constants(context: Context, plan: ItemPlan, dense: float) -> dict[tuple[int, int], float]:
    """Milliseconds of adding the constant of `drop:mean`; alike ones are timed once.

    The sum alone is timed: all else that happens in place of a sub-block happens for `drop` too.
    """
    session, sites = context.session, context.space.sites
    places = {place: (given, sites[place[0]].constant) for place, given in plan.constants.items()}
    alike = list(dict.fromkeys(places.values()))

    def subject(given: Given, shape: tuple[int, ...]) -> Subject:
        sum_of = [list(given.shape), given.dtype, list(shape)]
        return Subject(
            {**plan.description([], []), "sum": sum_of, "threads": context.threads},
            lambda: sum_with(given, shape),
        )

    found = session.measure(
        [subject(*each) for each in alike],
        lambda: runner(context.model, plan.item, context.sample),
        session.timing.model_seconds if session.timing else 0.0,
        context.footprint,
    )
    taken = {each: dense * measured.ratio for each, measured in zip(alike, found, strict=True)}
    return {place: taken[each] for place, each in places.items()}


def _with_caches(context: Context, plan: ItemPlan, dense: float) -> dict[tuple[int, int], float]:
    """Milliseconds that packing takes more than what a dense cache does; alike ones are timed once.

    The cache alone is timed. Attention over several tokens at a time has their keys twice; what
    that takes is seen where whole models are timed.
    """
    session, works = context.session, plan.cache_works

    def subject(work: CacheWork) -> Subject:
        described = {"cache": work.description, "threads": context.threads}
        return Subject({**plan.description([], []), **described}, work.call)

    found = session.measure(
        [subject(work) for work in works],
        lambda: runner(context.model, plan.item, context.sample),
        session.timing.model_seconds if session.timing else 0.0,
        context.footprint,
    )
    taken = {work.key: dense * m.ratio for work, m in zip(works, found, strict=True)}
    return {
        place: taken[work.key] - (taken[work.unpacked.key] if work.unpacked else 0.0)
        for place, work in plan.caches.items()
    }
