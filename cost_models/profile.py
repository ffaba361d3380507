"""The profile of a space on one device for one request: measured, corrected, with its error."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np
from torch import nn

from apportion.cost_models import correction
from apportion.cost_models.fingerprint import fingerprint as this_machine
from apportion.cost_models.fitting import Fitted, fit_whole, implementation_names
from apportion.cost_models.measured import ItemTimes, measure_item
from apportion.cost_models.operators import model_dtype
from apportion.cost_models.planning import Context, plan_item, shares_of
from apportion.cost_models.requests import RequestItem
from apportion.cost_models.rows import Choice, choose
from apportion.cost_models.sampling import Config
from apportion.cost_models.session import Progress, Record, Session, Stored, Timing, threads_set
from apportion.cost_models.table import CostTable, Rows, padded
from apportion.kernels.group import resident_bytes
from apportion.spaces.batches import Batch
from apportion.spaces.compressors.compose import RANK_MULTIPLE
from apportion.spaces.space import Space

CACHE_MULTIPLE = 2
CONFIGURATIONS = 24
"""Measured whole; from 20 on their errors give the margin."""
USUAL = Timing()


@dataclass(frozen=True)
class Profile:
    """Everything that a study needs to know of one device; JSON-able, and equal when replayed.

    Attributes:
        fingerprint: of the device.
        conditions: load, power source and governor when the first measurement was taken.
        request: what latency means.
        sites: names.
        options: texts [site][option].
        implementations: site -> option -> what runs it, for all but dense, keep and drops.
        uncredited: site -> options that run dense and get no latency credit.
        dense_ms: the dense model's milliseconds for the whole request.
        rows: corrected milliseconds [site][option].
        upper: their upper values.
        base: milliseconds that no site holds.
        margin: m of the design.
        factors: for each request item, class of operator -> what its rows were multiplied by.
        measured, predicted: the whole configurations, each predicted without itself, in ms.
        operators: how many distinct ones were measured.
        operator_width: median half width of their intervals, relative.
    """

    fingerprint: dict[str, Any]
    conditions: dict[str, Any]
    request: tuple[RequestItem, ...]
    sites: tuple[str, ...]
    options: tuple[tuple[str, ...], ...]
    implementations: dict[str, dict[str, str]]
    uncredited: dict[str, list[str]]
    dense_ms: float
    rows: tuple[tuple[float, ...], ...]
    upper: tuple[tuple[float, ...], ...]
    base: float
    margin: float
    factors: tuple[dict[str, float], ...]
    measured: tuple[float, ...]
    predicted: tuple[float, ...]
    operators: int
    operator_width: float

    @property
    def table(self) -> CostTable:
        """The cost table as arrays."""
        return CostTable(padded(self.rows), padded(self.upper), self.base, self.margin)

    @property
    def mean_error(self) -> float:
        """Mean absolute relative error of the whole configurations; nan where there are none."""
        return correction.mean_error(np.array(self.measured), np.array(self.predicted))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Inverse of `to_json`, also after a way through JSON text."""
        parts: dict[str, Any] = dict(value)
        parts |= {key: tuple(value[key]) for key in ("sites", "factors", "measured", "predicted")}
        parts |= {key: tuple(map(tuple, value[key])) for key in ("options", "rows", "upper")}
        parts["request"] = tuple(RequestItem.from_json(item) for item in value["request"])
        return cls(**parts)


def measure_profile(
    model: nn.Module,
    space: Space,
    request: Sequence[RequestItem],
    sample: Batch,
    *,
    threads: int,
    known: Mapping[str, Stored],
    record: Record,
    seed: int = 0,
    progress: Progress = lambda done, total: None,
    uniforms: Sequence[Config] = (),
    timing: Timing | None = USUAL,
    configurations: int = CONFIGURATIONS,
    fingerprint: Mapping[str, Any] | None = None,
    rank_multiple: int = RANK_MULTIPLE,
) -> Profile:
    """Measure what is not known yet, and make the profile of all that is.

    Args:
        model: the dense model, in evaluation mode.
        space: its sites and options.
        request: what latency means.
        sample: a batch of the study's data.
        threads: intra-op threads.
        known: stored measurements by key; none of them is taken again.
        record: is handed each batch of new measurements, to be stored.
        seed: of the configurations that are measured whole, and of the interleaving.
        progress: is told how many measurements are done, of how many.
        uniforms: configurations that are measured whole in any case.
        timing: how long to measure; None: a recorded device, nothing is timed.
        configurations: how many are measured whole.
        fingerprint: of the recorded device; None: this machine.
        rank_multiple: ranks of rP% are multiples of it.

    Raises:
        InvalidInput: a recorded device lacks a measurement, or the model cannot do the request.
    """
    device = dict(fingerprint or this_machine(threads))
    session = Session(known, record, timing, seed, progress)
    with threads_set(threads):
        context = make_context(model, space, sample, threads, rank_multiple, device, session)
        session.conditions()
        plans = [plan_item(context, item) for item in request]
        session.total = sum(len(p.operators) + len(set(p.structures.values())) + 1 for p in plans)
        session.total += sum(len(set(p.alternatives.values())) for p in plans)
        session.total += sum(len(set(p.constants.values())) + len(p.cache_works) for p in plans)
        session.total += configurations * len(plans)
        items = [measure_item(context, plan) for plan in plans]
        choice = choose(space, items, model_dtype(model))
        fitted = fit_whole(context, items, choice, configurations, uniforms)
    return _profile(device, context, items, choice, fitted)


def make_context(
    model: nn.Module,
    space: Space,
    sample: Batch,
    threads: int,
    rank_multiple: int,
    device: Mapping[str, Any],
    session: Session,
) -> Context:
    """What the measuring of a device has in common."""
    size = resident_bytes(model)
    footprint = min(size, CACHE_MULTIPLE * int(device["cache_bytes"]))
    shares = shares_of(model, space, sample)
    return Context(model, space, sample, threads, rank_multiple, footprint, size, session, shares)


def _profile(
    device: dict[str, Any],
    context: Context,
    items: Sequence[ItemTimes],
    choice: Choice,
    fitted: Fitted,
) -> Profile:
    space = context.space
    widths = [width for times in items for width in times.widths]
    return Profile(
        fingerprint=device,
        conditions=context.session.conditions(),
        request=tuple(times.plan.item for times in items),
        sites=tuple(space.names),
        options=space.texts,
        implementations=implementation_names(context, choice),
        uncredited=_uncredited(space, choice),
        dense_ms=fitted.dense,
        rows=_ragged(fitted.rows, space),
        upper=_ragged(fitted.upper, space),
        base=fitted.base,
        margin=fitted.margin,
        factors=fitted.factors,
        measured=tuple(map(float, fitted.measured)),
        predicted=tuple(map(float, fitted.predicted)),
        operators=sum(len(times.operators) for times in items),
        operator_width=float(np.median(widths)) if widths else 0.0,
    )


def _uncredited(space: Space, choice: Choice) -> dict[str, list[str]]:
    found = {
        site.name: [
            text
            for text, credited in zip(space.texts[place], choice.credited[place], strict=True)
            if not credited
        ]
        for place, site in enumerate(space.sites)
    }
    return {name: texts for name, texts in found.items() if texts}


def _ragged(rows: Rows, space: Space) -> tuple[tuple[float, ...], ...]:
    return tuple(
        tuple(map(float, row[: len(texts)])) for row, texts in zip(rows, space.texts, strict=True)
    )
