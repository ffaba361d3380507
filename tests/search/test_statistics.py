"""Standard errors, against plain formulas and against simulation."""

import numpy as np

from apportion.search.statistics import estimate, paired


def test_estimate_equals_the_textbook_error_of_a_mean():
    losses = np.random.default_rng(0).normal(2, 1, 50)
    found = estimate(losses, np.ones(50), None)
    assert np.isclose(found.mean, losses.mean())
    assert np.isclose(found.error, losses.std(ddof=1) / np.sqrt(50))
    assert found.clusters == 50 and not found.by_document


def test_estimate_of_a_ratio_equals_a_loop_over_documents():
    rng = np.random.default_rng(1)
    documents = rng.integers(0, 25, 200) * 7
    weights = rng.integers(1, 9, 200).astype(float)
    losses = weights * rng.normal(1, 0.3, 200)
    mean = losses.sum() / weights.sum()
    sums = [(losses - mean * weights)[documents == d].sum() for d in set(documents.tolist())]
    expected = np.sqrt(25 / 24 * sum(s**2 for s in sums)) / weights.sum()
    found = estimate(losses, weights, documents)
    assert np.isclose(found.error, expected) and found.by_document and found.clusters == 25


def test_estimate_clusters_by_window_below_twenty_documents():
    found = estimate(np.arange(38.0), np.ones(38), np.arange(38) // 2)
    assert found.clusters == 38 and not found.by_document


def test_estimate_of_one_window_has_no_error():
    assert np.isnan(estimate(np.ones(1), np.ones(1), None).error)


def test_paired_equals_the_error_of_the_differences():
    rng = np.random.default_rng(2)
    one, other = rng.normal(3, 1, 40), rng.normal(2, 1, 40)
    found = paired(one, np.ones(40), other, np.ones(40))
    assert np.isclose(found.mean, (one - other).mean())
    assert np.isclose(found.error, (one - other).std(ddof=1) / np.sqrt(40))


def test_paired_error_covers_the_truth_under_clustering():
    rng, inside = np.random.default_rng(3), 0
    documents = np.repeat(np.arange(40), 4)
    for _ in range(500):
        common = rng.normal(0, 5, 160)
        difference = rng.normal(0.2, 1, 40)[documents] + rng.normal(0, 0.5, 160)
        weights = np.full(160, 3.0)
        found = paired(
            weights * (common + difference), weights, weights * common, weights, documents
        )
        inside += abs(found.mean - 0.2) < 1.96 * found.error
    assert 0.91 < inside / 500 < 0.98
