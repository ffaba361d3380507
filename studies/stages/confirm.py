"""Confirm: the front, the winner and its rivals on held-out data and as whole models on the device.

The winner was fixed before held-out data were read. They judge: a baseline within the same limits
that is better by more than two paired standard errors takes its place, and the report says so.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from apportion.search.statistics import Estimate, estimate, paired
from apportion.studies.database.rows import Evaluation
from apportion.studies.stages.search import Candidate

PART: Final = "heldout"
MOST_POINTS = 12
SIGNIFICANT = 2.0


@dataclass(frozen=True)
class Judged:
    """A configuration on held-out data and as a whole model on each device.

    Attributes:
        loss: held-out, with its standard error.
        latency_ms: device -> predicted and measured ms, and the measured ratio to dense with its
            interval; None where the device is not here.
        labels: roles it plays: "front", "winner", "rival", "uniform:w4g64".
    """

    candidate: Candidate
    evaluation: Evaluation
    loss: Estimate
    latency_ms: Mapping[str, Mapping[str, float | None]]
    labels: list[str] = field(default_factory=list)


def to_confirm(
    front: Sequence[Candidate],
    winner: Candidate,
    rival: Candidate | None,
    uniforms: Mapping[str, Candidate],
) -> list[tuple[Candidate, list[str]]]:
    """What is judged, each configuration once, with the roles it plays.

    Of a longer front, at most 12 points spread evenly over its order, the winner among them.
    """
    chosen: dict[tuple[int, ...], tuple[Candidate, list[str]]] = {}
    roles = [(winner, "winner"), *((c, "front") for c in spread(front, MOST_POINTS))]
    if rival is not None:
        roles.append((rival, "rival"))
    roles += [(candidate, f"uniform:{option}") for option, candidate in uniforms.items()]
    for candidate, role in roles:
        chosen.setdefault(candidate.config, (candidate, []))[1].append(role)
    return list(chosen.values())


def spread(points: Sequence[Candidate], most: int) -> list[Candidate]:
    """At most `most` of the points, both ends and evenly between them."""
    if len(points) <= most:
        return list(points)
    places = {round(k * (len(points) - 1) / (most - 1)) for k in range(most)}
    return [points[place] for place in sorted(places)]


def held_out_loss(evaluation: Evaluation, documents: Any) -> Estimate:
    """Mean held-out loss with its standard error; nan for a failed evaluation."""
    if evaluation.failure or evaluation.losses is None or evaluation.weights is None:
        return Estimate(float("nan"), float("nan"), 0, False)
    return estimate(evaluation.losses, evaluation.weights, documents)


def difference(one: Evaluation, other: Evaluation, documents: Any) -> Estimate:
    """Paired difference, one less the other, on the same windows."""
    if one.losses is None or one.weights is None or other.losses is None or other.weights is None:
        return Estimate(float("nan"), float("nan"), 0, False)
    return paired(one.losses, one.weights, other.losses, other.weights, documents)


def replacement(winner: Judged, baselines: Sequence[Judged], documents: Any) -> Judged | None:
    """The baseline that must be exported in the winner's place, or None.

    It keeps the same limits and is better on held-out data by more than two paired standard errors.
    """
    better = []
    for baseline in baselines:
        if baseline is winner or not baseline.candidate.feasible:
            continue
        found = difference(baseline.evaluation, winner.evaluation, documents)
        if found.mean < -SIGNIFICANT * found.error:
            better.append(baseline)
    return min(better, key=lambda judged: judged.loss.mean, default=None)
