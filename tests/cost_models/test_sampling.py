"""Configurations spread over the predicted range."""

import numpy as np

from apportion.cost_models.sampling import Shape, stratified


def space(sites: int = 12) -> tuple[np.ndarray, Shape, np.ndarray]:
    """A block that can be dropped around the second half of the sites."""
    generator = np.random.default_rng(0)
    rows = generator.uniform(0.2, 2.0, size=(sites, 4))
    rows[0] = [0.1, 0.0, np.inf, np.inf]
    drops = np.zeros_like(rows, dtype=bool)
    drops[0, 1] = True
    count = np.array([2] + [4] * (sites - 1))
    parent = np.array([-1 if n < sites // 2 else 0 for n in range(sites)])
    alike = np.tile(np.arange(4), (sites, 1))
    return rows, Shape(count, parent, drops), alike


def sampled(seed: int, count: int = 24, given=()) -> list[tuple[int, ...]]:
    rows, shape, alike = space()
    return stratified(rows, shape, alike, count, np.random.default_rng(seed), given)


def test_sample_is_distinct_canonical_and_reproducible() -> None:
    rows, shape, _ = space()
    configs = sampled(0)
    assert len(set(configs)) == 24 and configs == sampled(0) != sampled(1)
    assert all(shape.canonical(config) == config for config in configs)
    assert all(np.isfinite(shape.total(rows, config)) for config in configs)


def test_sample_reaches_from_fastest_to_slowest() -> None:
    rows, shape, _ = space()
    totals = np.sort([shape.total(rows, config) for config in sampled(0)])
    slowest = np.where(np.isfinite(rows), rows, 0).max(1).sum()
    fastest = rows[1:6].min(1).sum()
    assert totals[0] == fastest and totals[-1] == slowest
    assert np.diff(totals).max() < 0.15 * (slowest - fastest)


def test_sample_holds_what_is_given() -> None:
    uniform = (0,) + (2,) * 11
    assert sampled(0, given=[uniform])[0] == uniform


def test_sample_small_space_gives_all_of_it() -> None:
    rows = np.array([[1.0, 2.0]])
    shape = Shape(np.array([2]), np.array([-1]), np.zeros((1, 2), dtype=bool))
    found = stratified(rows, shape, np.array([[0, 1]]), 24, np.random.default_rng(0), [])
    assert sorted(found) == [(0,), (1,)]


def test_sample_options_that_run_alike_are_one() -> None:
    rows, shape, alike = space()
    alike[:, 3] = 2
    configs = stratified(rows, shape, alike, 24, np.random.default_rng(0), [(0,) + (3,) * 11])
    assert not any(3 in config for config in configs)
