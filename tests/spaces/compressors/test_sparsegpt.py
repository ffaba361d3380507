"""SparseGPT against its paper's algorithm in float64, and against Wanda and magnitude."""

from decimal import Decimal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from apportion.errors import InvalidInput
from apportion.spaces.compressors.sparsegpt import sparsegpt
from apportion.spaces.compressors.sparsify import keep_largest, keep_wanda, removed_count


def _case(seed=0, out=10, inputs=48, tokens=200):
    """Weights, and correlated inputs whose mean squares differ by orders of magnitude."""
    random = torch.Generator().manual_seed(seed)
    mixing = torch.randn(inputs, inputs, generator=random, dtype=torch.float64)
    latent = torch.randn(tokens, inputs, generator=random, dtype=torch.float64)
    x = (latent * torch.arange(1, inputs + 1).double().rsqrt()) @ mixing
    x *= torch.exp(0.5 * torch.randn(inputs, generator=random, dtype=torch.float64))
    return torch.randn(out, inputs, generator=random) * 0.05, x.T @ x


def _output_error(weight, values, moment):
    lost = (weight - values).double()
    return float(((lost @ moment) * lost).sum())


def _published(weight, sparsity, moment):
    """(kept, weights) of algorithm 1, with the Cholesky factor of the explicit inverse."""
    w, kept = weight.double(), torch.ones_like(weight, dtype=torch.bool)
    out, inputs = weight.shape
    identity = torch.eye(inputs, dtype=torch.float64)
    inverse = torch.linalg.inv(moment + 0.01 * moment.diagonal().mean() * identity)
    factor = torch.linalg.cholesky(inverse, upper=True)
    span = sparsity[1] if isinstance(sparsity, tuple) else 128
    for j in range(inputs):
        if j % span == 0:
            block = range(j, min(j + span, inputs))
            scores = {(r, c): float(w[r, c] / factor[c, c]) ** 2 for r in range(out) for c in block}
            for r, c in _least(scores, sparsity, out, block):
                kept[r, c] = False
        stored = w[:, j] * kept[:, j]
        w[:, j:] -= torch.outer((w[:, j] - stored) / factor[j, j], factor[j, j:])
        w[:, j] = stored
    return kept, w


def _least(scores, sparsity, out, block):
    if not isinstance(sparsity, tuple):
        removed = [removed_count(sparsity, out * end) for end in (block.start, block.stop)]
        return sorted(scores, key=scores.__getitem__)[: removed[1] - removed[0]]
    n, m = sparsity
    rows = (sorted(((r, c) for c in block), key=scores.__getitem__) for r in range(out))
    return [place for row in rows for place in row[: m - n]]


@pytest.mark.parametrize(
    "sparsity",
    [Decimal(50), Decimal("62.5"), Decimal("0.1"), Decimal("99.9"), (2, 4), (4, 8), (1, 4), (3, 6)],
    ids=str,
)
@pytest.mark.parametrize("inputs", [48, 312])
def test_sparsegpt_is_the_published_definition(sparsity, inputs):
    weight, moment = _case(1, 5, inputs, 2 * inputs)
    kept, values = sparsegpt(weight, sparsity, moment)
    published_kept, published = _published(weight, sparsity, moment)
    assert torch.equal(kept, published_kept)
    torch.testing.assert_close(values.double(), published, rtol=0, atol=1e-5)


@given(st.integers(0, 99), st.integers(0, 1000), st.sampled_from([7, 48, 150]))
def test_sparsegpt_removes_the_exact_count(seed, permille, inputs):
    weight, moment = _case(seed, 6, inputs, 60)
    percent = Decimal(permille) / 10
    kept, values = sparsegpt(weight, percent, moment)
    assert int((~kept).sum()) == removed_count(percent, 6 * inputs)
    assert not values[~kept].any() and values.isfinite().all()


@given(st.integers(0, 99), st.sampled_from([(2, 4), (4, 8), (1, 4), (1, 3), (100, 150), (4, 4)]))
def test_sparsegpt_keeps_n_of_every_m_consecutive_inputs(seed, pattern):
    n, m = pattern
    weight, moment = _case(seed, 6, 2 * m, 60)
    kept, values = sparsegpt(weight, pattern, moment)
    assert (kept.view(6, 2, m).sum(2) == n).all()
    assert not values[~kept].any()


def test_sparsegpt_refuses_inputs_that_the_pattern_does_not_divide():
    weight, moment = _case(inputs=42)
    with pytest.raises(InvalidInput, match="2:4 needs a multiple of 4 inputs, not 42"):
        sparsegpt(weight, (2, 4), moment)


@pytest.mark.parametrize("percent, share", [(50, 0.65), (60, 0.65), (80, 0.85)])
def test_sparsegpt_has_less_output_error_than_wanda_than_magnitude(percent, share):
    errors = []
    for seed in range(20):
        weight, moment = _case(seed)
        errors.append(
            [
                _output_error(weight, values, moment)
                for values in (
                    sparsegpt(weight, Decimal(percent), moment)[1],
                    weight * keep_wanda(weight, Decimal(percent), moment),
                    weight * keep_largest(weight, Decimal(percent)),
                )
            ]
        )
    corrected, wanda, magnitude = torch.tensor(errors).unbind(1)
    assert (corrected < wanda).double().mean() >= 0.9
    assert corrected.mean() < share * wanda.mean() and wanda.mean() < 0.9 * magnitude.mean()


def test_sparsegpt_of_two_of_four_has_less_output_error_than_their_magnitude():
    weight, moment = _case()
    smallest = weight.abs().view(10, 12, 4).argsort(2)[..., :2]
    magnitude = weight.view(10, 12, 4).scatter(2, smallest, 0).view(10, 48)
    error = _output_error(weight, sparsegpt(weight, (2, 4), moment)[1], moment)
    assert error < 0.6 * _output_error(weight, magnitude, moment)


def test_sparsegpt_of_uncorrelated_inputs_is_wanda_over_the_whole_matrix():
    weight, moment = _case()
    moment = torch.diag(moment.diagonal())
    kept, values = sparsegpt(weight, Decimal(50), moment)
    damped = moment.diagonal() + 0.01 * moment.diagonal().mean()
    scores = weight.double().square() * damped
    assert scores[~kept].max() < scores[kept].min()
    assert torch.equal(values, weight * kept)


def test_sparsegpt_removes_dead_inputs_first():
    weight, moment = _case()
    dead = torch.arange(48) % 3 == 0
    moment[dead], moment[:, dead] = 0, 0
    kept, _ = sparsegpt(weight, Decimal(50), moment)
    assert not kept[:, dead].any() and int(kept.sum()) == 240


@pytest.mark.parametrize("kind", ["zero", "one token", "constant", "repeated", "one live input"])
@pytest.mark.parametrize("sparsity", [Decimal(60), (2, 4)], ids=str)
def test_sparsegpt_of_a_singular_moment_is_no_worse_than_magnitude(kind, sparsity):
    weight, _ = _case()
    x = torch.randn(40, 48, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    x = {
        "zero": x * 0,
        "one token": x[:1],
        "constant": torch.full_like(x, 3.0),
        "repeated": x[:, :24].repeat(1, 2),
        "one live input": x * (torch.arange(48) == 7),
    }[kind]
    kept, values = sparsegpt(weight, sparsity, x.T @ x)
    assert values.isfinite().all()
    assert int(kept.sum()) == 192 if sparsity == Decimal(60) else 240
    magnitude = weight * keep_largest(weight, Decimal(60))
    assert _output_error(weight, values, x.T @ x) <= _output_error(weight, magnitude, x.T @ x)


def test_sparsegpt_is_deterministic_and_leaves_its_arguments_alone():
    weight, moment = _case()
    weight_before, moment_before = weight.clone(), moment.clone()
    first, second = (sparsegpt(weight, Decimal(50), m) for m in (moment, moment.clone()))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    assert torch.equal(weight, weight_before) and torch.equal(moment, moment_before)


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_sparsegpt_of_equal_weights_still_removes_the_exact_count(value):
    _, moment = _case()
    kept, _ = sparsegpt(torch.full((10, 48), value), Decimal(25), moment)
    assert int(kept.sum()) == 360
