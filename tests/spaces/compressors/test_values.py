"""Fewer value dimensions against closed forms in float64."""

from decimal import Decimal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apportion.errors import InvalidInput
from apportion.kernels.formats import LayerShape
from apportion.kernels.reference import reference_weight
from apportion.spaces.compressors.compose import InputStatistics
from apportion.spaces.compressors.treatment import realize_treatment
from apportion.spaces.compressors.values import (
    fewer_values,
    joint_pair,
    kept_values,
    output_moment,
    value_refusal,
)
from apportion.spaces.grammar import parse_option
from apportion.spaces.sites import Cut, Member, Width

IN, OUT, D = 20, 24, 8
DAMPING = 1e-6


def random(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def inputs(tokens=200, seed=5):
    return random(tokens, IN, seed=seed) @ random(IN, IN, seed=seed + 1)


def error(output, value, left, transform, moment):
    """Squared norm of what the outputs differ by on inputs of that second moment."""
    lost = output @ value - left @ transform @ value
    return float(torch.trace(lost @ moment @ lost.T))


def attention(kv, queries, narrowing=(), stacks=None):
    """The width of a sub-block with that many key-value heads and queries for each."""
    heads, stacks = kv * queries, stacks or kv
    made = Cut(Member("v", LayerShape(stacks * D, IN)), "out", 1, stacks, narrowing)
    read = Cut(Member("o", LayerShape(OUT, heads * D)), "in", 1, heads)
    key = Cut(Member("k", LayerShape(kv * D, IN)), "whole")
    return Width("value", D, ((key, made), (read,)))


def weights_of(width, seed=0):
    shapes = [cut.member.shape for cut in width.cuts]
    return [
        random(s.out_features, s.in_features, seed=seed + n).float() for n, s in enumerate(shapes)
    ]


def head_products(width, value, output, kv, size):
    """[kv, queries, out, in]: W_o W_v of each query head, of matrices with `size` a head."""
    rows = value.double().view(kv, size, -1)
    columns = output.double().view(OUT, kv, -1, size)
    return torch.einsum("okqd,kdi->kqoi", columns, rows)


@pytest.mark.parametrize("rows", [D, 24, 72])
@pytest.mark.parametrize("rank", [1, 3, D])
@pytest.mark.parametrize("whitened", [True, False])
def test_joint_pair_reaches_the_tail_of_the_singular_values_of_the_whole_product(
    rows, rank, whitened
):
    output, value, x = random(rows, D), random(D, IN, seed=1), inputs()
    moment = x.T @ x
    damped = moment + DAMPING * moment.diagonal().mean() * torch.eye(IN, dtype=torch.float64)
    norm = damped if whitened else torch.eye(IN, dtype=torch.float64)
    left, transform = joint_pair(output, value, rank, moment if whitened else None)
    root = torch.linalg.cholesky(norm)
    tail = torch.linalg.svdvals(output @ value @ root)[rank:].square().sum()
    total = torch.linalg.svdvals(output @ value @ root).square().sum()
    found = error(output, value, left, transform, norm)
    assert found == pytest.approx(float(tail), rel=1e-8, abs=1e-12 * float(total))
    assert (left.shape, transform.shape) == ((rows, rank), (rank, D))


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), rank=st.integers(1, D - 1), step=st.floats(1e-4, 1.0))
def test_no_other_pair_of_the_rank_has_a_smaller_error(seed, rank, step):
    output, value, x = random(24, D, seed=seed), random(D, IN, seed=seed + 1), inputs(seed=seed)
    moment = x.T @ x
    left, transform = joint_pair(output, value, rank, moment)
    other = left + step * random(24, rank, seed=seed + 2)
    right = transform + step * random(rank, D, seed=seed + 3)
    found = error(output, value, left, transform, moment)
    # The damping moves the optimum by less than a millionth of the whole.
    slack = 2 * DAMPING * float(torch.trace(output @ value @ moment @ value.T @ output.T))
    for pair in ((other, transform), (left, right), (other, right)):
        assert found <= error(output, value, *pair, moment) + slack


@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_few_tokens_lose_no_more_than_plain_singular_values(tokens):
    output, value, x = random(48, D), random(D, IN, seed=1), inputs()[:tokens]
    moment = x.T @ x
    left, transform = joint_pair(output, value, 4, moment)
    plain = error(output, value, *joint_pair(output, value, 4, None), moment)
    assert left.isfinite().all() and transform.isfinite().all()
    assert error(output, value, left, transform, moment) <= plain * (1 + 1e-6)


@pytest.mark.parametrize("kv, queries", [(1, 1), (2, 3), (4, 1)])
@pytest.mark.parametrize("moment", [None, inputs().T @ inputs()], ids=["svd", "whitened"])
def test_all_dimensions_give_the_same_products(kv, queries, moment):
    width = attention(kv, queries)
    _, value, output = weights = weights_of(width)
    fewer = fewer_values(width, weights, [None] * 3, D, moment)
    exact = head_products(width, value, output, kv, D)
    found = head_products(width, fewer.weights[1], fewer.weights[2], kv, D)
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-5)
    assert fewer.weights[0] is weights[0] and fewer.biases == (None, None, None)


@pytest.mark.parametrize("kv, queries", [(1, 2), (2, 3), (4, 1)])
def test_queries_of_a_head_are_approximated_together(kv, queries):
    width, x = attention(kv, queries), inputs()
    _, value, output = weights = weights_of(width)
    fewer = fewer_values(width, weights, [None] * 3, 4, x.T @ x)
    exact = head_products(width, value, output, kv, D)
    found = head_products(width, fewer.weights[1], fewer.weights[2], kv, 4)
    root = torch.linalg.cholesky(x.T @ x)
    for head in range(kv):
        stacked = exact[head].reshape(-1, IN)
        tail = torch.linalg.svdvals(stacked @ root)[4:].square().sum()
        lost = (stacked - found[head].reshape(-1, IN)) @ root
        assert float(lost.square().sum()) == pytest.approx(float(tail), rel=1e-5)
        assert torch.linalg.matrix_rank(found[head].reshape(-1, IN), rtol=1e-5) == 4


@pytest.mark.parametrize("narrowing", [(4, 5), (2, 5)], ids=["behind", "between"])
def test_values_among_queries_and_keys_become_what_they_become_alone(narrowing):
    fused = attention(2, 1, narrowing, stacks=6)
    key, made, output = weights_of(fused)
    bias, x = random(6 * D, seed=7).float(), inputs()
    rows = torch.tensor([head * D + row for head in narrowing for row in range(D)])
    alone = fewer_values(
        attention(2, 1), [key, made[rows], output], [None, bias[rows], None], 4, x.T @ x
    )
    found = fewer_values(fused, [key, made, output], [None, bias, None], 4, x.T @ x)
    sizes = [4 if head in narrowing else D for head in range(6)]
    parts = found.weights[1].split(sizes), found.biases[1].split(sizes)
    assert torch.equal(torch.cat([parts[0][head] for head in narrowing]), alone.weights[1])
    assert torch.equal(torch.cat([parts[1][head] for head in narrowing]), alone.biases[1])
    for head in set(range(6)) - set(narrowing):
        assert torch.equal(parts[0][head], made[head * D : (head + 1) * D])
        assert torch.equal(parts[1][head], bias[head * D : (head + 1) * D])
    assert torch.equal(found.weights[2], alone.weights[2])


@pytest.mark.parametrize("after", [True, False], ids=["with", "without"])
def test_the_constant_that_the_value_bias_adds_stays_where_the_output_has_a_bias(after):
    width, x = attention(2, 2), inputs()
    weights, bias = weights_of(width), random(2 * D, seed=8)
    behind = random(OUT, seed=9) if after else None
    fewer = fewer_values(width, weights, [None, bias, behind], 3, x.T @ x)

    def added(output, offset, size):
        columns = output.double().view(OUT, 2, 2, size)
        return torch.einsum("okqd,kd->o", columns, offset.view(2, size))

    before = added(weights[2], bias, D)
    now = added(fewer.weights[2], fewer.biases[1], 3)
    if after:
        torch.testing.assert_close(now + fewer.biases[2], before + behind, rtol=0, atol=1e-5)
        assert not torch.allclose(fewer.biases[2], behind)
    else:
        assert fewer.biases[2] is None and not torch.allclose(now, before, atol=1e-3)
    assert fewer.biases[1].shape == (6,) and fewer.biases[1].dtype == bias.dtype


@pytest.mark.parametrize("kv, queries", [(1, 1), (2, 3)])
def test_moment_behind_fewer_values_is_that_of_the_new_values(kv, queries):
    seen, transforms = random(50, kv * queries, D), random(kv, 3, D, seed=1)
    each = transforms.repeat_interleave(queries, 0)
    changed = torch.einsum("thd,hrd->thr", seen, each).reshape(50, -1)
    flat = seen.reshape(50, -1)
    torch.testing.assert_close(output_moment(flat.T @ flat, transforms), changed.T @ changed)


def test_what_follows_is_fitted_on_what_is_left():
    width, x, seen = attention(2, 2), inputs(), random(300, 4 * D, seed=4)
    weights = weights_of(width)
    entering = InputStatistics(x.T @ x, len(x), x.abs().amax(0).float())
    between = InputStatistics(seen.T @ seen, len(seen))
    option = parse_option("v50%+w4:gptq")
    stored = realize_treatment(weights, width, option, [entering, between], "float32", 4)
    plain = realize_treatment(
        weights, width, parse_option("v50%"), [entering, between], "float32", 4
    )
    key, value, output = map(reference_weight, stored.weights)
    assert (key.shape, value.shape, output.shape) == ((16, IN), (8, IN), (OUT, 16))
    exact = reference_weight(plain.weights[2])
    fewer = fewer_values(width, weights, [None] * 3, 4, x.T @ x)
    assert torch.equal(exact, fewer.weights[2])
    moment = output_moment(between.second_moment, fewer.transforms)
    rounded = realize_treatment(
        weights, width, parse_option("v50%+w4"), [entering, between], "float32", 4
    )
    losses = [
        float(torch.trace(lost @ moment @ lost.T))
        for lost in (
            (each - exact).double() for each in (output, reference_weight(rounded.weights[2]))
        )
    ]
    # gptq corrects for its inputs, and so knows them
    assert losses[0] < losses[1]


def test_plain_singular_values_stand_in_where_nothing_is_known():
    width = attention(2, 1)
    weights = weights_of(width)
    unknown = realize_treatment(
        weights, width, parse_option("v50%"), [None, None], "float32", 4
    ).weights
    asked = realize_treatment(
        weights,
        width,
        parse_option("v50%:svd"),
        [InputStatistics(inputs().T @ inputs(), 200), None],
        "float32",
        4,
    ).weights
    assert all(
        torch.equal(a.tensors["weight"], b.tensors["weight"])
        for a, b in zip(unknown, asked, strict=True)
    )
    with pytest.raises(InvalidInput, match="whitened needs calibration statistics"):
        realize_treatment(weights, width, parse_option("v50%:whitened"), [None, None], "float32", 4)


@given(st.integers(1, 99_999), st.integers(1, 256), st.sampled_from([1, 4, 8, 16]))
def test_kept_values_are_the_largest_multiple_within_the_percentage(thousandths, size, multiple):
    percent = Decimal(thousandths) / 1000
    kept = kept_values(percent, size, multiple)
    assert kept % multiple == 0 and kept < size
    assert kept * 100 <= percent * size < (kept + multiple) * 100


@pytest.mark.parametrize(
    "text, multiple, told",
    [
        ("v50%", 4, None),
        ("v50%", 5, "v50% of 8 value dimensions is no multiple of 5; at least v62.5%"),
        ("v62.5%", 5, None),
        ("v99%", 8, "v99% of 8 value dimensions is no multiple of 8"),
        ("v50%+w8a8s", 4, "a8s needs the range of the new values, which nobody saw; "
                          "nearest: v50%+w8a8"),
    ],
)  # fmt: skip
def test_refusals_say_what_fits(text, multiple, told):
    assert value_refusal(parse_option(text), attention(2, 1), multiple) == told


@pytest.mark.parametrize("place", ["weight", "moment"])
def test_values_that_are_not_finite_are_refused(place):
    width = attention(2, 1)
    weights, moment = weights_of(width), inputs().T @ inputs()
    {"weight": weights[2], "moment": moment}[place][0, 0] = torch.nan
    with pytest.raises(InvalidInput, match="not finite"):
        fewer_values(width, weights, [None] * 3, 4, moment)


def test_width_in_values_survives_json_and_that_of_others_is_as_it_was():
    for width in (attention(2, 1), attention(2, 1, (2, 5), stacks=6)):
        assert Width.from_json(width.to_json()) == width
    assert all("narrowing" not in cut.to_json() for cut in attention(2, 1).cuts)
