"""Which weights go: exact counts, magnitude over the matrix, Wanda per output row."""

from decimal import Decimal
from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from apportion.spaces.compressors.sparsify import (
    keep_largest,
    keep_pattern,
    keep_wanda,
    removed_count,
)


def _matrices(seed, out=6, inputs=10):
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(40, inputs, generator=random, dtype=torch.float64) * torch.arange(1, inputs + 1)
    return torch.randn(out, inputs, generator=random), x


@given(st.integers(0, 99), st.integers(1, 999), st.booleans())
def test_keep_removes_the_exact_count(seed, permille, wanda):
    weight, x = _matrices(seed)
    percent = Decimal(permille) / 10
    kept = keep_wanda(weight, percent, x.T @ x) if wanda else keep_largest(weight, percent)
    assert int((~kept).sum()) == round(percent * 60 / 100)


def test_removed_count_is_exact_in_decimals():
    assert removed_count(Decimal("62.5"), 1000) == 625
    assert removed_count(Decimal("0.1"), 3000) == 3


def test_keep_largest_removes_the_smallest_of_the_whole_matrix():
    weight, _ = _matrices(0)
    kept = keep_largest(weight, Decimal(45))
    assert weight[~kept].abs().max() < weight[kept].abs().min()


@given(st.integers(0, 99))
def test_keep_wanda_is_the_brute_force_definition_per_row(seed):
    weight, x = _matrices(seed)
    kept = keep_wanda(weight, Decimal(40), x.T @ x)
    for row in range(6):
        scores = [abs(weight[row, i].item()) * x[:, i].norm().item() for i in range(10)]
        removed = sorted(range(10), key=scores.__getitem__)[:4]
        assert [i for i in range(10) if not kept[row, i]] == sorted(removed)


def test_keep_wanda_takes_the_remainder_where_it_scores_least():
    weight = torch.tensor([[1.0, 5, 9], [1, 4, 9], [1, 6, 9]])
    kept = keep_wanda(weight, Decimal("44.5"), torch.eye(3, dtype=torch.float64))
    assert kept.tolist() == [[False, True, True], [False, False, True], [False, True, True]]


def test_keep_wanda_removes_inputs_never_seen_first():
    weight, _ = _matrices(1)
    moment = torch.diag(torch.tensor([1.0, 0.0] * 5, dtype=torch.float64))
    kept = keep_wanda(weight, Decimal(50), moment)
    assert kept.tolist() == [[True, False] * 5] * 6


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_keep_of_equal_weights_still_removes_the_exact_count(value):
    weight = torch.full((4, 8), value)
    assert int(keep_largest(weight, Decimal(25)).sum()) == 24
    assert int(keep_wanda(weight, Decimal(25), torch.eye(8, dtype=torch.float64)).sum()) == 24


PATTERNS = [(2, 4), (4, 8), (1, 4), (3, 5), (1, 2)]


@pytest.mark.parametrize("n, m", PATTERNS)
@pytest.mark.parametrize("wanda", [True, False])
def test_keep_pattern_is_the_best_of_all_patterns_in_every_group(n, m, wanda):
    weight, x = _matrices(0, 6, 40)
    kept = keep_pattern(weight, (n, m), x.T @ x if wanda else None).reshape(-1, m)
    says = x.square().sum(0) if wanda else torch.ones(40, dtype=torch.float64)
    worth = (weight.double().square() * says).reshape(-1, m)
    patterns = torch.zeros(0, m, dtype=torch.bool)
    for chosen in combinations(range(m), n):
        patterns = torch.cat(
            [patterns, (torch.arange(m)[:, None] == torch.tensor(chosen)).any(1)[None]]
        )
    assert torch.equal(kept, patterns[(worth @ patterns.double().T).argmax(1)])


@pytest.mark.parametrize("n, m", PATTERNS)
def test_keep_pattern_of_equal_weights_still_keeps_n_of_m(n, m):
    kept = keep_pattern(torch.zeros(3, 40), (n, m))
    assert (kept.reshape(-1, m).sum(1) == n).all()
    assert removed_count((n, m), 120) == int((~kept).sum())
