"""Tucker-2 of convolutions against its definition in float64, plain and for the outputs."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apportion.spaces.compressors.tucker import ITERATIONS, tucker2

SHAPE = (20, 12, 6)


def _case(seed=0, shape=SHAPE, tokens=400):
    """Weights [out, channels, positions], and unfolded inputs of correlated channels."""
    random = torch.Generator().manual_seed(seed)
    _, channels, positions = shape
    latent = torch.randn(tokens, channels * positions, generator=random, dtype=torch.float64)
    mix = torch.randn(channels * positions, channels * positions, generator=random).double()
    mix += 3 * torch.kron(torch.randn(channels, channels, generator=random), torch.eye(positions))
    x = latent * torch.arange(1, channels * positions + 1).double().rsqrt() @ mix
    return torch.randn(shape, generator=random), x


def _product(left, core, right):
    kernel = core.reshape(left.shape[1], len(right), -1)
    return torch.einsum("or,rip,ic->ocp", left, kernel, right)


def _lost(weight, factors):
    return (weight.double() - _product(*factors)).flatten(1)


def _published(weight, rank, input_rank):
    """The best product after the iterations of the papers: singular vectors of each unfolding."""

    def leading(tensor, mode, count):
        unfolding = np.moveaxis(tensor, mode, 0).reshape(tensor.shape[mode], -1)
        return np.linalg.svd(unfolding, full_matrices=False)[0][:, :count]

    tensor = weight.double().numpy()
    inputs = leading(tensor, 1, input_rank)
    for _ in range(ITERATIONS):
        outputs = leading(np.moveaxis(np.tensordot(tensor, inputs, (1, 0)), -1, 1), 0, rank)
        inputs = leading(np.tensordot(outputs.T, tensor, (1, 0)), 1, input_rank)
    outputs = leading(np.moveaxis(np.tensordot(tensor, inputs, (1, 0)), -1, 1), 0, rank)
    return np.einsum("ocp,oa,ba,ci,di->bdp", tensor, outputs, outputs, inputs, inputs)


@pytest.mark.parametrize(("rank", "input_rank"), [(8, 4), (3, 12), (20, 5), (1, 1)])
def test_plain_is_what_orthogonal_iteration_gives(rank, input_rank):
    weight, _ = _case()
    found = _product(*tucker2(weight, rank, input_rank, None))
    assert np.allclose(found.numpy(), _published(weight, rank, input_rank), atol=1e-9)


@settings(deadline=None)
@given(st.integers(0, 1000), st.integers(1, 7), st.integers(1, 5))
def test_plain_lies_between_the_tails_of_the_singular_values(seed, rank, input_rank):
    weight, _ = _case(seed, (7, 5, 4))
    rank, input_rank = min(rank, 4 * input_rank), min(input_rank, 4 * rank)
    error = float(_lost(weight, tucker2(weight, rank, input_rank, None)).square().sum())
    exact = weight.double()
    tails = [
        float(torch.linalg.svdvals(unfolding.flatten(1))[kept:].square().sum())
        for unfolding, kept in ((exact, rank), (exact.transpose(0, 1), input_rank))
    ]
    assert max(tails) - 1e-9 <= error <= sum(tails) + 1e-9


@pytest.mark.parametrize("seen", [True, False])
def test_a_weight_of_these_ranks_is_recovered(seen):
    random = torch.Generator().manual_seed(3)
    left, core, right = (
        torch.randn(size, generator=random, dtype=torch.float64)
        for size in ((20, 7), (7, 4 * 6), (4, 12))
    )
    weight, (_, x) = _product(left, core, right), _case()
    factors = tucker2(weight, 7, 4, x.T @ x if seen else None)
    assert [factor.shape for factor in factors] == [(20, 7), (7, 24), (4, 12)]
    assert _lost(weight, factors).norm() < 1e-8 * weight.norm()


@pytest.mark.parametrize("tokens", [400, 30])
def test_whitened_is_optimal_given_the_channels_it_takes(tokens):
    weight, x = _case(tokens=tokens)
    left, core, right = tucker2(weight, 5, 4, x.T @ x)
    # all that outputs of the taken channels can give is a projection of the outputs over tokens
    outputs = x @ weight.double().flatten(1).T
    taken = torch.einsum("tcp,ic->tip", x.unflatten(1, SHAPE[1:]), right).flatten(1)
    basis, sizes, _ = torch.linalg.svd(taken, full_matrices=False)
    basis = basis[:, sizes > 1e-9 * sizes[0]]
    kept = torch.linalg.svdvals(basis.T @ outputs)[:5].square().sum()
    optimum = float(outputs.square().sum() - kept)
    error = float((_lost(weight, (left, core, right)) @ x.T).square().sum())
    assert error == pytest.approx(optimum, rel=1e-3)


@pytest.mark.parametrize("seed", range(5))
def test_whitened_loses_less_of_the_outputs_than_plain(seed):
    weight, x = _case(seed)
    moment = x.T @ x
    plain, whitened = (
        float((_lost(weight, tucker2(weight, 8, 5, m)) @ x.T).square().sum())
        for m in (None, moment)
    )
    assert whitened < 0.9 * plain


def test_whitened_with_alike_inputs_is_as_good_as_plain():
    weight, _ = _case()
    identity = torch.eye(12 * 6, dtype=torch.float64)
    plain, whitened = (_lost(weight, tucker2(weight, 6, 5, m)).norm() for m in (None, identity))
    assert float(whitened) == pytest.approx(float(plain), rel=1e-5)


def test_without_any_input_it_is_plain():
    weight, _ = _case()
    nothing = tucker2(weight, 6, 5, torch.zeros(72, 72, dtype=torch.float64))
    assert all(map(torch.equal, nothing, tucker2(weight, 6, 5, None)))
