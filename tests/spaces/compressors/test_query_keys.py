"""Fewer query-key dimensions against closed forms and enumeration in float64."""

from decimal import Decimal
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apportion.errors import InvalidInput
from apportion.kernels.formats import LayerShape
from apportion.kernels.reference import reference_weight
from apportion.spaces.compressors.compose import InputStatistics
from apportion.spaces.compressors.query_keys import (
    fewer_dimensions,
    fewer_query_keys,
    joint_transforms,
    kept_query_keys,
    query_key_refusal,
)
from apportion.spaces.compressors.treatment import realize_treatment
from apportion.spaces.grammar import parse_option
from apportion.spaces.sites import Cut, Member, Width

IN, D = 20, 8
HALVES = (4, 5, 6, 7, 0, 1, 2, 3)
NEIGHBORS = (1, 0, 3, 2, 5, 4, 7, 6)
PARTIAL = (2, 3, 0, 1, 4, 5, 6, 7)


def random(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def inputs(tokens=200, seed=5):
    return random(tokens, IN, seed=seed) @ random(IN, IN, seed=seed + 1)


def statistics(x):
    return InputStatistics(x.T @ x, len(x), x.abs().amax(0).float())


def attention(kv, queries, pairs=()):
    """The width of a sub-block with that many key-value heads and queries for each."""
    heads = tuple(range(kv))
    of_queries = tuple(head for head in heads for _ in range(queries))
    query = Cut(
        Member("q", LayerShape(kv * queries * D, IN)), "out", 1, kv * queries, (), of_queries
    )
    key = Cut(Member("k", LayerShape(kv * D, IN)), "out", 1, kv, (), heads, heads)
    value = Cut(Member("v", LayerShape(kv * D, IN)), "whole")
    return Width("query-key", kv * D, ((query, key, value),), pairs=pairs)


def weights_of(width, seed=0):
    shapes = [cut.member.shape for cut in width.cuts]
    return [
        random(s.out_features, s.in_features, seed=seed + n).float() for n, s in enumerate(shapes)
    ]


def products(width, query, key, size):
    """[kv, queries, in, in]: W_q^T W_k of each query head, of matrices with `size` a head."""
    keys = key.double().view(width.heads, size, -1)
    queries = query.double().view(width.heads, -1, size, query.shape[1])
    return torch.einsum("hqdi,hdj->hqij", queries, keys)


@pytest.mark.parametrize("kv, queries", [(1, 1), (2, 3), (4, 1)])
@pytest.mark.parametrize("whitened", [True, False])
@pytest.mark.parametrize("count", [1, 4])
def test_scores_lose_the_tail_of_the_singular_values_of_the_whole_product(
    kv, queries, whitened, count
):
    width, x = attention(kv, queries), inputs()
    query, key, value = weights = weights_of(width)
    seen = [statistics(x) if whitened else None] * 3
    fewer = fewer_query_keys(width, weights, [None] * 3, count, seen)
    root = torch.linalg.cholesky(x.T @ x) if whitened else torch.eye(IN, dtype=torch.float64)
    exact = root.T @ products(width, query, key, D) @ root
    found = root.T @ products(width, *fewer.weights[:2], count) @ root
    for head in range(kv):
        stacked = exact[head].reshape(-1, IN)
        tail = torch.linalg.svdvals(stacked)[count:].square().sum()
        lost = (stacked - found[head].reshape(-1, IN)).square().sum()
        assert float(lost) == pytest.approx(float(tail), rel=1e-5)
    assert fewer.weights[2] is value
    assert fewer.kept == tuple(h * D + i for h in range(kv) for i in range(count))


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), rank=st.integers(1, D - 1), step=st.floats(1e-4, 1.0))
def test_no_other_pair_of_the_rank_has_a_smaller_error(seed, rank, step):
    query, key = random(24, D, seed=seed), random(D, 30, seed=seed + 1)
    left, right, _ = joint_transforms(query.T @ query, key @ key.T)
    found = query @ left[:rank].T, right[:rank] @ key
    error = (query @ key - found[0] @ found[1]).norm()
    moved = (
        found[0] + step * random(24, rank, seed=seed + 2),
        found[1] + step * random(rank, 30, seed=seed + 3),
    )
    for one, other in ((found[0], moved[1]), (moved[0], found[1]), moved):
        assert error <= (query @ key - one @ other).norm() * (1 + 1e-9)


def test_all_dimensions_change_nothing_and_one_rank_is_split_evenly():
    query, key = random(24, D), random(D, 30, seed=1)
    left, right, strengths = joint_transforms(query.T @ query, key @ key.T)
    torch.testing.assert_close(right.T @ left, torch.eye(D).double(), rtol=0, atol=1e-9)
    torch.testing.assert_close((query @ left.T).norm(dim=0), strengths.sqrt())
    torch.testing.assert_close((right @ key).norm(dim=1), strengths.sqrt())


@pytest.mark.parametrize("rank", [0, 2, 5])
def test_what_no_input_takes_gives_zeros_and_no_infinite_weights(rank):
    query = random(24, rank, seed=2) @ random(rank, D, seed=3)
    key = random(D, 30, seed=1)
    left, right, strengths = joint_transforms(query.T @ query, key @ key.T)
    assert left.isfinite().all() and right.isfinite().all()
    assert not left[rank:].any() and not right[rank:].any()
    torch.testing.assert_close(query @ left.T @ right @ key, query @ key, rtol=0, atol=1e-7)


def brute_force(query, key, pairs, count):
    """The dimensions of the most expected squares of scores, over all choices of pairs."""
    rotated = [(i, j) for i, j in enumerate(pairs) if i < j]

    def adds(pair):
        return sum(
            float((query[:, i] ** 2).sum() * (key[j] ** 2).sum()) / 2 for i in pair for j in pair
        )

    return max(
        combinations(rotated, count // 2), key=lambda chosen: sum(adds(pair) for pair in chosen)
    )


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([HALVES, NEIGHBORS]), st.sampled_from([2, 4, 6]))
def test_pairs_that_stay_are_those_that_add_most_to_squared_scores(seed, pairs, count):
    query, key = random(24, D, seed=seed), random(D, 30, seed=seed + 1)
    none = torch.zeros(D, D, dtype=torch.float64)
    found = fewer_dimensions(query.T @ query, key @ key.T, none, pairs, count)
    best = brute_force(query, key, pairs, count)
    assert found.places == tuple(sorted(place for pair in best for place in pair))
    chosen = torch.eye(D, dtype=torch.float64)[list(found.places)]
    assert torch.equal(found.queries, chosen) and torch.equal(found.keys, chosen)


def test_share_of_a_pair_is_its_mean_squared_score_over_all_angles():
    query, key = random(50, 2), random(40, 2, seed=1)
    total, steps = 0.0, 360
    for step in range(steps):
        angle = torch.tensor(2 * torch.pi * step / steps, dtype=torch.float64)
        turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()]).view(2, 2)
        total += float((query @ turn @ key.T).square().sum()) / steps
    share = float(query.square().sum() * key.square().sum()) / 2
    assert share == pytest.approx(total, rel=1e-9)


def test_first_of_equal_pairs_stay():
    same = torch.eye(D, dtype=torch.float64)
    found = fewer_dimensions(same, same, torch.zeros_like(same), HALVES, 4)
    assert found.places == (0, 1, 4, 5)


@pytest.mark.parametrize("strong, places", [(4.0, (0, 2, 4, 5)), (0.01, (4, 5, 6, 7))])
def test_as_many_pairs_stay_beside_what_is_not_rotated_as_add_most(strong, places):
    query, key = random(24, D), random(D, 30, seed=1)
    query[:, :4] *= 0.01
    query[:, [0, 2]] *= strong * 100
    none = torch.zeros(D, D, dtype=torch.float64)
    found = fewer_dimensions(query.T @ query, key @ key.T, none, PARTIAL, 4)
    assert found.places == places
    free = torch.linalg.svdvals(query[:, 4:] @ key[4:])
    kept = [p for p in places if p >= 4]
    scores = (query @ found.queries.T)[:, -len(kept) :] @ (found.keys @ key)[-len(kept) :]
    lost = (query[:, 4:] @ key[4:] - scores).square().sum()
    assert float(lost) == pytest.approx(float(free[len(kept) :].square().sum()), abs=1e-9)


def test_each_head_keeps_its_own_pairs_as_they_are():
    width, x = attention(2, 2, HALVES), inputs()
    weights = weights_of(width)
    biases = [random(4 * D, seed=8), random(2 * D, seed=9).float(), None]
    weights[0][:D] *= torch.tensor([3.0, 1, 1, 1] * 2)[:, None]
    weights[0][2 * D : 3 * D] *= torch.tensor([1.0, 1, 1, 5] * 2)[:, None]
    fewer = fewer_query_keys(width, weights, biases, 2, [statistics(x)] * 3)
    assert fewer.kept == (0, 4, D + 3, D + 7)
    for cut, dense, bias, now, shifted in zip(
        width.cuts, weights, biases, fewer.weights, fewer.biases, strict=True
    ):
        rows = cut.places(fewer.kept, width.units) if cut.heads else slice(None)
        assert torch.equal(now, dense[rows])
        if bias is not None:
            assert torch.equal(shifted, bias[rows]) and shifted.dtype == bias.dtype


def test_biases_count_where_pairs_are_chosen():
    width, x = attention(1, 1, HALVES), inputs()
    weights, bias = weights_of(width), torch.zeros(D)
    bias[2] = 1e3
    for biases in ([bias, None, None], [None, bias, None]):
        fewer = fewer_query_keys(width, weights, biases, 2, [statistics(x)] * 3)
        assert fewer.kept == (2, 6)


def scores(query, key, of_query, of_key, x):
    """[tokens, tokens] of one head."""
    return (x @ query.double().T + of_query.double()) @ (x @ key.double().T + of_key.double()).T


def test_bias_of_the_keys_has_no_say_and_changes_no_softmax():
    width, x = attention(1, 1), inputs()
    weights, bias = weights_of(width), 100 * random(D, seed=3)
    seen = [statistics(x)] * 3
    found, plain = (
        fewer_query_keys(width, weights, [None, own, None], 4, seen) for own in (bias, None)
    )
    assert all(torch.equal(one, two) for one, two in zip(found.weights, plain.weights, strict=True))
    zero = torch.zeros(4)
    made = [scores(*found.weights[:2], zero, own, x).softmax(-1) for own in (found.biases[1], zero)]
    torch.testing.assert_close(*made)


def test_bias_of_the_queries_is_fitted_like_the_weights_of_a_constant_input():
    width, x = attention(1, 1), inputs()
    x -= x.mean(0)
    weights, bias = weights_of(width), 20 * random(D, seed=3)
    fewer = fewer_query_keys(width, weights, [bias, None, None], 4, [statistics(x)] * 3)
    query = torch.cat([weights[0].double(), bias[:, None]], 1)
    wider = torch.block_diag((x.T @ x), torch.tensor([[float(len(x))]]).double())
    roots = torch.linalg.cholesky(wider), torch.linalg.cholesky(x.T @ x)
    tail = torch.linalg.svdvals(roots[0].T @ query.T @ weights[1].double() @ roots[1])[4:]
    zero = torch.zeros(D)
    lost = scores(*weights[:2], bias, zero, x) - scores(
        *fewer.weights[:2], fewer.biases[0], zero[:4], x
    )
    assert float(lost.square().sum()) == pytest.approx(float(tail.square().sum()), rel=1e-4)


def test_queries_keys_and_values_of_one_matrix_become_what_they_become_alone():
    width, x = attention(2, 1), inputs()
    weights, bias = weights_of(width), random(6 * D, seed=7).float()
    member = Member("qkv", LayerShape(6 * D, IN))
    cut = Cut(member, "out", 1, 6, (), (0, 1, -1, 1, 0, -1), (3, 4))
    query, key, value = (list(weight.split(D)) for weight in weights)
    whole = torch.cat([query[0], query[1], value[0], key[1], key[0], value[1]])
    fused = Width("query-key", 2 * D, ((cut,),))
    found = fewer_query_keys(fused, [whole], [bias], 4, [statistics(x)])
    given = list(bias.split(D))
    own = [torch.cat(given[:2]), torch.cat([given[4], given[3]]), None]
    alone = fewer_query_keys(width, weights, own, 4, [statistics(x)] * 3)
    parts = found.weights[0].split([4, 4, D, 4, 4, D])
    offsets = found.biases[0].split([4, 4, D, 4, 4, D])
    assert torch.equal(torch.cat([parts[0], parts[1]]), alone.weights[0])
    assert torch.equal(torch.cat([parts[4], parts[3]]), alone.weights[1])
    assert torch.equal(torch.cat([offsets[4], offsets[3]]), alone.biases[1])
    assert torch.equal(parts[2], value[0]) and torch.equal(offsets[5], given[5])
    assert cut.narrowed(len(found.kept)).out_features == len(found.weights[0])


@pytest.mark.parametrize("pairs", [(), HALVES, PARTIAL])
def test_what_follows_is_done_to_all_that_is_left(pairs):
    width, seen = attention(2, 2, pairs), statistics(inputs())
    weights = weights_of(width)
    made = [
        realize_treatment(weights, width, parse_option(text), [seen], "float32", 4)
        for text in ("q50%", "q50%+w8", "q50%+w8a8s")
    ]
    plain = fewer_query_keys(width, weights, [None] * 3, 4, [seen] * 3)
    assert all(each.kept == plain.kept and each.biases == plain.biases for each in made)
    shapes = [(16, IN), (8, IN), (16, IN)]
    for stored, exact, shape in zip(made[0].weights, plain.weights, shapes, strict=True):
        assert torch.equal(reference_weight(stored), exact) and exact.shape == shape
    assert made[2].weights[0].format.static_activations


def test_plain_singular_values_stand_in_where_nothing_is_known():
    width = attention(2, 1)
    weights = weights_of(width)

    def made(text, seen):
        stored = realize_treatment(weights, width, parse_option(text), [seen], "float32", 4)
        return [reference_weight(weight) for weight in stored.weights]

    asked, unknown = made("q50%:svd", statistics(inputs())), made("q50%", None)
    assert all(torch.equal(one, two) for one, two in zip(asked, unknown, strict=True))
    assert not torch.equal(asked[0], made("q50%", statistics(inputs()))[0])
    with pytest.raises(InvalidInput, match="whitened needs calibration statistics"):
        made("q50%:whitened", None)


@given(st.integers(1, 99_999), st.sampled_from([1, 3, 4, 8]), st.sampled_from([(), HALVES]))
def test_kept_dimensions_are_a_multiple_within_the_percentage_and_even_of_pairs(
    thousandths, multiple, pairs
):
    percent = Decimal(thousandths) / 1000
    kept = kept_query_keys(percent, attention(2, 2, pairs), multiple)
    assert kept % multiple == 0 and kept * 100 <= percent * D
    assert not pairs or kept % 2 == 0


@pytest.mark.parametrize(
    "percent, pairs, multiple, told",
    [
        (50, (), 4, None),
        (25, HALVES, 1, None),
        (12.5, (), 1, None),
        (12.5, HALVES, 1, "q12.5% of 8 query-key dimensions is no multiple of 2; at least q25%"),
        (50, (), 5, "q50% of 8 query-key dimensions is no multiple of 5; at least q62.5%"),
        (99, (), 8, "q99% of 8 query-key dimensions is no multiple of 8"),
    ],
)
def test_refusals_say_what_fits(percent, pairs, multiple, told):
    width = attention(2, 1, pairs)
    assert query_key_refusal(Decimal(str(percent)), width, multiple) == told


@pytest.mark.parametrize("place", ["weight", "moment"])
def test_values_that_are_not_finite_are_refused(place):
    width, seen = attention(2, 1), statistics(inputs())
    weights = weights_of(width)
    {"weight": weights[1], "moment": seen.second_moment}[place][0, 0] = torch.nan
    with pytest.raises(InvalidInput, match="not finite"):
        fewer_query_keys(width, weights, [None] * 3, 4, [seen] * 3)


def test_width_in_query_keys_survives_json():
    for width in (attention(2, 3), attention(2, 1, HALVES)):
        assert Width.from_json(width.to_json()) == width
    assert "pairs" not in attention(2, 3).to_json()
    assert "heads" not in attention(2, 3).cuts[2].to_json()
