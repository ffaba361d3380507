"""What a profile would still have to measure, without measuring it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from apportion.cost_models.fingerprint import fingerprint
from apportion.cost_models.planning import plan_item
from apportion.cost_models.profile import CONFIGURATIONS, USUAL, make_context
from apportion.cost_models.requests import RequestItem
from apportion.cost_models.session import Session, Stored, Timing
from apportion.hashing import content_hash
from apportion.spaces.batches import Batch
from apportion.spaces.compressors.compose import RANK_MULTIPLE
from apportion.spaces.space import Space

BESIDES = ("copies", "against")
"""What the description of a timed operator has more than the operator's own."""


@dataclass(frozen=True)
class Outlook:
    """How much of a profile is there.

    Attributes:
        operators: distinct ones that it needs.
        measured: how many of them are stored.
        seconds: about what the rest and the whole configurations take.
    """

    operators: int
    measured: int
    seconds: float


def outlook(
    model: nn.Module,
    space: Space,
    request: Sequence[RequestItem],
    sample: Batch,
    *,
    threads: int,
    known: Mapping[str, Stored],
    timing: Timing = USUAL,
    configurations: int = CONFIGURATIONS,
    rank_multiple: int = RANK_MULTIPLE,
) -> Outlook:
    """Run the model once for each request item and count; arguments as of `measure_profile`."""
    session = Session(known, lambda batch: None, None, 0, lambda done, total: None)
    device = fingerprint(threads)
    context = make_context(model, space, sample, threads, rank_multiple, device, session)
    plans = [plan_item(context, item) for item in request]
    subjects = [dict(stored["subject"]) for stored in known.values() if "subject" in stored]
    stored = {content_hash({k: v for k, v in s.items() if k not in BESIDES}) for s in subjects}
    needed = {key for plan in plans for key in plan.operators}
    changed = [{*plan.structures.values(), *plan.alternatives.values()} for plan in plans]
    whole = sum(1 + len(names) + configurations for names in changed)
    whole += sum(len(set(plan.constants.values())) + len(plan.cache_works) for plan in plans)
    models = {plan.model for plan in plans}
    whole_stored = sum(subject.get("model") in models for subject in subjects)
    seconds = timing.operator_seconds * len(needed - stored)
    seconds += timing.model_seconds * max(0, whole - whole_stored)
    return Outlook(len(needed), len(needed & stored), seconds)
