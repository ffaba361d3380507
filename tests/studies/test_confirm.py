"""Who is judged, and when a baseline takes the winner's place."""

import numpy as np
import pytest

from apportion.search.statistics import estimate
from apportion.studies.database.rows import Evaluation
from apportion.studies.stages.confirm import Judged, difference, replacement, spread, to_confirm
from apportion.studies.stages.search import Candidate, best_rival, front, winner

WINDOWS = 100


def candidate(
    number: int, loss: float, size: float, origin: str = "ilp", ok: bool = True
) -> Candidate:
    return Candidate(number, (number,), loss, {"weight_bytes": size}, origin, ok)


def judged(of: Candidate, mean: float, noise: float, seed: int, ok: bool = True) -> Judged:
    losses = mean + noise * np.random.default_rng(seed).standard_normal(WINDOWS)
    evaluation = Evaluation(losses, np.ones(WINDOWS), None, 0.0)
    return Judged(of, evaluation, estimate(losses, np.ones(WINDOWS), None), {})


def test_winner_is_the_least_loss_within_the_limits() -> None:
    candidates = [candidate(1, 0.1, 5, ok=False), candidate(2, 0.3, 3), candidate(3, 0.2, 4)]
    assert winner(candidates).number == 3


def test_front_leaves_out_what_is_dominated() -> None:
    candidates = [candidate(1, 0.1, 5), candidate(2, 0.3, 3), candidate(3, 0.35, 3)]
    assert [c.number for c in front(candidates, ["weight_bytes"])] == [1, 2]


def test_rival_is_the_best_uniform_that_costs_no_more() -> None:
    chosen = candidate(1, 0.1, 5)
    rivals = [
        candidate(2, 0.05, 6, "uniform:w4"),
        candidate(3, 0.3, 5, "uniform:w3"),
        candidate(4, 0.2, 4, "uniform:w3-drop1"),
    ]
    found = best_rival([chosen, *rivals], chosen, ["weight_bytes"])
    assert found is not None and found.number == 4


def test_each_configuration_is_judged_once_with_all_its_roles() -> None:
    one, two = candidate(1, 0.1, 5), candidate(2, 0.3, 3, "uniform:w3")
    roles = to_confirm([one, two], one, two, {"w3": two})
    assert [(c.number, labels) for c, labels in roles] == [
        (1, ["winner", "front"]),
        (2, ["front", "rival", "uniform:w3"]),
    ]


def test_long_front_is_thinned_evenly_between_its_ends() -> None:
    points = [candidate(number, 0.1, 5) for number in range(100)]
    numbers = [c.number for c in spread(points, 12)]
    assert len(numbers) == 12 and numbers[0] == 0 and numbers[-1] == 99
    assert max(np.diff(numbers)) <= 10


@pytest.mark.parametrize(("mean", "replaced"), [(0.09, True), (0.0999, False), (0.2, False)])
def test_baseline_replaces_only_when_significantly_better(mean: float, replaced: bool) -> None:
    chosen = judged(candidate(1, 0.1, 5), 0.1, 0.01, 1)
    baseline = judged(candidate(2, 0.1, 5, "uniform:w3"), mean, 0.01, 2)
    assert (replacement(chosen, [baseline], None) is baseline) == replaced


def test_baseline_outside_the_limits_never_replaces() -> None:
    chosen = judged(candidate(1, 0.1, 5), 0.1, 0.01, 1)
    baseline = judged(candidate(2, 0.1, 9, "uniform:w4", ok=False), 0.01, 0.001, 2)
    assert replacement(chosen, [baseline], None) is None


def test_failed_evaluation_has_no_difference() -> None:
    good = judged(candidate(1, 0.1, 5), 0.1, 0.01, 1).evaluation
    failed = Evaluation(None, None, "not finite", 0.0)
    assert np.isnan(difference(good, failed, None).mean)
