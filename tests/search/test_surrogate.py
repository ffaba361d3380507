"""The corrected additive model learns what the measured table got wrong."""

from dataclasses import replace

import numpy as np

from apportion.search.surrogate import Observations, Surrogate, floored


def with_table(problem, rng):
    """The problem with a random loss table."""
    loss = np.where(problem.present, rng.lognormal(-4, 1, problem.loss.shape), np.inf)
    loss[:, 0] = 0.0
    return replace(problem, loss=loss)


def observed(problem, table, count, rng):
    """Random configurations with the losses that `table` gives them."""
    drawn = (tuple(int(rng.integers(n)) for n in problem.count) for _ in range(count))
    kept = problem.parent < 0
    configs = [problem.canonical(tuple(np.where(kept, 0, config).tolist())) for config in drawn]
    losses = np.array([problem.summed(table, config) for config in configs])
    return Observations(configs, losses, np.ones(count))


def test_surrogate_without_observations_is_the_table(synthetic):
    problem = with_table(synthetic(0).problem, np.random.default_rng(0))
    seen = Observations([], np.zeros(0), np.zeros(0))
    assert np.array_equal(Surrogate(problem, seen).mean_table(), floored(problem))


def test_surrogate_learns_factors_that_the_table_lacks(synthetic):
    rng = np.random.default_rng(1)
    problem = with_table(synthetic(0).problem, rng)
    truth = floored(problem) * rng.uniform(0.3, 1.7, (problem.sites, 1))
    learned = Surrogate(problem, observed(problem, truth, 60, rng)).mean_table()
    fresh = observed(problem, truth, 40, rng)
    errors = [
        np.abs(np.log([problem.summed(t, c) for c in fresh.configs]) - np.log(fresh.losses)).mean()
        for t in (floored(problem), learned)
    ]
    assert errors[1] < 0.35 * errors[0]


def test_sampled_tables_scatter_around_the_mean_and_bar_the_same(synthetic):
    rng = np.random.default_rng(2)
    problem = with_table(synthetic(0).problem, rng)
    model = Surrogate(problem, observed(problem, floored(problem), 30, rng))
    drawn = np.array([model.sampled_table(rng) for _ in range(200)])
    barred = ~np.isfinite(model.table)
    assert np.isinf(drawn[:, barred]).all() and (drawn[:, ~barred] >= 0).all()
    real = ~barred & (model.table > 0)
    ratio = drawn[:, real].mean(axis=0) / model.mean_table()[real]
    assert np.abs(ratio - 1).max() < 0.15 and drawn[:, real].std(axis=0).min() > 0


def test_floored_keeps_lucky_options_from_being_free(synthetic):
    problem = with_table(synthetic(0).problem, np.random.default_rng(3))
    problem.loss[2, 1] = -0.01
    table = floored(problem)
    assert table[2, 1] > 0 and (table[:, 0] == 0).all()
