"""Measures whole configurations and corrects the rows by what they say."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from apportion.cost_models.correction import (
    Observations,
    corrected,
    leave_one_out,
    margin,
)
from apportion.cost_models.harness import Call
from apportion.cost_models.measured import ItemTimes
from apportion.cost_models.operators import ORIGINAL, model_dtype, runs_dense
from apportion.cost_models.planning import Context
from apportion.cost_models.requests import runner
from apportion.cost_models.rows import (
    STRUCTURE,
    Choice,
    ClassRows,
    alike_options,
    chosen_program,
    class_rows,
    experts_left,
    item_rows,
    shape_of,
)
from apportion.cost_models.sampling import Config, stratified
from apportion.cost_models.session import Subject
from apportion.cost_models.table import Rows
from apportion.cost_models.whole_model import configured
from apportion.spaces.space import DROP


@dataclass(frozen=True)
class Fitted:
    """Rows of the whole request after the correction, and how well they predict.

    Attributes:
        rows, upper: milliseconds [sites, options].
        base: milliseconds that no site holds.
        dense: the dense model's milliseconds.
        margin: m.
        factors: for each item, class -> factor.
        measured, predicted: whole configurations, each predicted without itself.
    """

    rows: Rows
    upper: Rows
    base: float
    dense: float
    margin: float
    factors: tuple[dict[str, float], ...]
    measured: NDArray[np.float64]
    predicted: NDArray[np.float64]


def fit_whole(
    context: Context,
    items: Sequence[ItemTimes],
    choice: Choice,
    configurations: int,
    uniforms: Sequence[Config],
) -> Fitted:
    """Measure `configurations` of the space whole, and fit one correction for each request item.

    Which ones is a function of the measured operators and the session's seed.
    """
    raw = [item_rows(context.space, times, choice) for times in items]
    counts = [times.plan.item.count for times in items]
    total = _summed(counts, [rows for rows, _ in raw])
    generator = np.random.default_rng(context.session.seed)
    alike = alike_options(choice, total)
    shape = shape_of(context.space)
    configs = stratified(total, shape, alike, configurations, generator, uniforms)
    by_class = [
        class_rows(context.space, times, choice, mean)
        for times, (mean, _) in zip(items, raw, strict=True)
    ]
    seen = [
        _observations(context, times, choice, of, configs)
        for times, of in zip(items, by_class, strict=True)
    ]
    factors = [corrected(each) for each in seen]
    each = list(zip(by_class, factors, raw, strict=True))
    rows = _summed(counts, [of.corrected(mean, factor) for of, factor, (mean, _) in each])
    upper = _summed(counts, [of.corrected(high, factor) for of, factor, (_, high) in each])
    measured = _summed(counts, [each.measured[each.anchors :] for each in seen])
    predicted = _summed(counts, [leave_one_out(each) for each in seen])
    dense = sum(c * times.dense for c, times in zip(counts, items, strict=True))
    return Fitted(
        rows=rows,
        upper=upper,
        base=dense - float(rows[:, 0].sum()),
        dense=dense,
        margin=margin(measured, predicted),
        factors=tuple(
            {name: float(f) for name, f in zip(choice.classes, factor, strict=True)}
            for factor in factors
        ),
        measured=measured,
        predicted=predicted,
    )


def _summed(counts: Sequence[int], values: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """The request's values from those of its items."""
    total = np.zeros_like(values[0])
    for count, value in zip(counts, values, strict=True):
        total = total + count * value
    return total


def _observations(
    context: Context,
    times: ItemTimes,
    choice: Choice,
    rows: ClassRows,
    configs: Sequence[Config],
) -> Observations:
    """The configurations measured whole, after those without structures that are known already."""
    shape = shape_of(context.space)
    texts = context.space.texts
    dropped = {some: t for some, t in times.dropped.items() if all(DROP in texts[p] for p in some)}
    known = [_dropping(context, places) for places in dropped]
    measured = [*dropped.values(), *_measured(context, times, choice, configs)]
    parts = [rows.of(config, shape) for config in (*known, *configs)]
    neutral = (0,) * len(rows.rows)
    return Observations(
        parts=np.array(parts).reshape(len(parts), rows.classes),
        measured=np.array(measured),
        dense_parts=rows.of(neutral, shape),
        dense=times.dense,
        anchors=len(known),
    )


def _dropping(context: Context, places: Sequence[int]) -> Config:
    texts = context.space.texts
    return tuple(row.index(DROP) if place in places else 0 for place, row in enumerate(texts))


def _measured(
    context: Context, times: ItemTimes, choice: Choice, configs: Sequence[Config]
) -> list[float]:
    """Milliseconds of whole configurations, from the store or from the clock."""
    session, plan = context.session, times.plan
    subjects = [_subject(context, times, choice, config) for config in configs]
    found = session.measure(
        subjects,
        lambda: runner(context.model, plan.item, context.sample),
        session.timing.model_seconds if session.timing else 0.0,
        context.model_bytes,
    )
    return [times.dense * measured.ratio for measured in found]


def _subject(context: Context, times: ItemTimes, choice: Choice, config: Config) -> Subject:
    space, plan = context.space, times.plan
    shape = shape_of(space)
    void = shape.void(config)
    there = [place for place in range(len(config)) if not void[place] and config[place]]
    running = [chosen_program(times, choice, place, config[place]) for place in there]
    operators = [o.key for program in running if program is not None for o in program]
    taken = [plan.alternatives.get((place, config[place])) for place in there]
    operators += [name for name in taken if name is not None]
    packed = [plan.caches[p, config[p]] for p in there if (p, config[p]) in plan.caches]
    operators += [f"cache:{work.key}" for work in packed]
    fewer = [place for place in there if config[place] in experts_left(space, place)]
    operators += [f"{plan.structures[p]}:{space.texts[p][config[p]]}" for p in fewer]
    # "drop:mean" is another work than "drop", and the name that it has had is kept for this one.
    dropped = [
        plan.structures[p] + space.texts[p][config[p]].removeprefix(DROP)
        for p in there
        if space.options[p][config[p]].drops
    ]

    def build() -> Call:
        names = implementation_names(context, choice)
        configuration = space.configuration(config)
        model = configured(context.model, space, configuration, names, context.rank_multiple)
        return runner(model, plan.item, context.sample)

    return Subject(plan.description(operators, dropped), build)


def implementation_names(context: Context, choice: Choice) -> dict[str, dict[str, str]]:
    """Site name -> option text -> implementation, for all options that replace layers."""
    dtype = model_dtype(context.model)
    return {
        site.name: {
            text: runs_dense(site, dtype) if name == ORIGINAL else name
            for text, name in zip(
                context.space.texts[place][1:], choice.names[place][1:], strict=True
            )
            if name != STRUCTURE
        }
        for place, site in enumerate(context.space.sites)
        if any(name != STRUCTURE for name in choice.names[place])
    }
