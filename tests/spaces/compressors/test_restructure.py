"""Sub-blocks made narrower, against float64 definitions on explicit inputs and enumeration."""

from decimal import Decimal
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apportion.errors import InvalidInput
from apportion.kernels.formats import ConvGeometry, LayerShape
from apportion.spaces.compressors.importance import independence, magnitude, removed_units
from apportion.spaces.compressors.restructure import (
    corrected,
    kept_units,
    narrowed_moment,
    restructure,
    width_refusal,
)
from apportion.spaces.sites import Cut, Member, Width

METHODS = ("magnitude", "wanda", "chip", "obs")
HALF = Decimal(50)


def _cut(name, side, out, inputs, features=1, stacks=1):
    return Cut(Member(name, LayerShape(out, inputs)), side, features, stacks)


def _width(units, features=1, consumers=(7,), unit="channel"):
    """Gate and up in one matrix over 5 inputs; each consumer has a group of its own."""
    made = _cut("gate_up", "out", 2 * units * features, 5, features, stacks=2)
    read = [
        (_cut(f"down{i}", "in", out, units * features, features),)
        for i, out in enumerate(consumers)
    ]
    return Width(unit, units, ((made,), *read))


def _random(seed=0):
    return torch.Generator().manual_seed(seed)


def _weights(width, seed=0):
    random = _random(seed)
    shapes = [cut.member.shape for cut in width.cuts]
    return [torch.randn(s.out_features, s.in_features, generator=random) for s in shapes]


def _inputs(seed=0, tokens=60, inputs=8):
    """Correlated inputs float64 [tokens, inputs] whose mean squares differ."""
    random = _random(seed + 1000)
    mixing = torch.randn(inputs, inputs, generator=random, dtype=torch.float64)
    x = torch.randn(tokens, inputs, generator=random, dtype=torch.float64) @ mixing
    return x * torch.exp(0.5 * torch.randn(inputs, generator=random, dtype=torch.float64))


def _singular(kind, inputs=8):
    """Inputs with a moment that has no inverse."""
    x = torch.randn(40, inputs, generator=_random(3), dtype=torch.float64)
    return {
        "zero": x * 0,
        "one token": x[:1],
        "constant": torch.full_like(x, 3.0),
        "repeated": x[:, : inputs // 2].repeat(1, 2),
        "one live input": x * (torch.arange(inputs) == 5),
    }[kind]


SINGULAR = pytest.mark.parametrize(
    "kind", ["zero", "one token", "constant", "repeated", "one live input"]
)


def _case(seed=0, units=8, features=1, consumers=(7,), x=None):
    """(width, weights, inputs of every consumer, moments)."""
    width = _width(units, features, consumers)
    inputs = [
        _inputs(seed + 10 * i, 60, units * features) if x is None else x
        for i in range(len(consumers))
    ]
    return width, _weights(width, seed), inputs, [None, *(x.T @ x for x in inputs)]


def _damped_inputs(x):
    """With rows that add 1 % of its mean to the moment's diagonal, and nothing else."""
    mean_square = x.square().sum(0).mean()
    return torch.cat([x, (0.01 * mean_square).sqrt() * torch.eye(x.shape[1], dtype=x.dtype)])


def _best_error(weight, x, stay):
    """Least squares: the smallest ||X W^T - X_S V^T||^2 over all V."""
    target = x @ weight.double().T
    if not len(stay):
        return float(target.square().sum())
    best = torch.linalg.lstsq(x[:, stay], target, driver="gelsd").solution
    return float((target - x[:, stay] @ best).square().sum())


def _output_error(weight, x, stay, values):
    lost = weight.double().clone()
    lost[:, stay] -= values.double()
    return float((x @ lost.T).square().sum())


def _loss_without(width, weights, inputs, gone):
    """What all consumers lose without these units after the best update, damped."""
    kept = [unit for unit in range(width.units) if unit not in gone]
    return sum(
        _best_error(weight, _damped_inputs(x), cut.places(kept, width.units))
        for cut, weight, x in zip(width.cuts[1:], weights[1:], inputs, strict=True)
    )


@given(st.integers(1, 1000), st.decimals("0.1", "99.9", places=1))
def test_the_units_kept_are_the_percentage_rounded_down(units, percent):
    kept = kept_units(percent, units)
    assert 100 * kept <= percent * units < 100 * (kept + 1)


@pytest.mark.parametrize(
    "units, percent, reason",
    [
        (4, "75", None),
        (4, "25", None),
        (4, "10", "c10% keeps none of 4 heads; at least c25%"),
        (3, "33.3", "c33.3% keeps none of 3 heads; at least c33.4%"),
        (4, "100", "c100% keeps all of 4 heads; at most c75%"),
        (1, "50", "c50% keeps none of 1 head"),
    ],
)
def test_a_width_of_no_or_all_units_is_refused_with_what_fits(units, percent, reason):
    assert width_refusal(Decimal(percent), _width(units, unit="head")) == reason


@given(st.integers(2, 900), st.sampled_from(["0.1", "100"]))
def test_the_percentage_that_a_refusal_names_is_not_refused(units, percent):
    reason = width_refusal(Decimal(percent), _width(units))
    if reason is not None:
        nearest = Decimal(reason.rpartition(" c")[2].removesuffix("%"))
        assert width_refusal(nearest, _width(units)) is None


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("features", [1, 3])
def test_producers_lose_the_rows_of_whole_units_and_nothing_else(method, features):
    width, weights, _, moments = _case(features=features)
    found = restructure(width, weights, moments, Decimal(70), method)
    assert len(found.kept) == 5 and list(found.kept) == sorted(set(found.kept))
    halves = weights[0].view(2, 8, features, 5)[:, list(found.kept)]
    assert torch.equal(found.weights[0], halves.reshape(-1, 5))
    assert found.weights[1].shape == (7, 5 * features)
    for cut, weight in zip(width.cuts, found.weights, strict=True):
        assert cut.narrowed(5) == LayerShape(*weight.shape) and weight.dtype == torch.float32


def test_convolutions_lose_filters_depthwise_kernels_and_input_channels():
    pixel = ConvGeometry((1, 1), (1, 1), (0, 0), (1, 1))
    depthwise = ConvGeometry((3, 3), (1, 1), (1, 1), (1, 1), groups=6)
    square = ConvGeometry((3, 3), (1, 1), (1, 1), (1, 1))
    cuts = (
        Cut(Member("expand", LayerShape(6, 4, pixel)), "out"),
        Cut(Member("depthwise", LayerShape(6, 9, depthwise)), "groups"),
        Cut(Member("project", LayerShape(5, 54, square)), "in", features=9),
        Cut(Member("beside", LayerShape(3, 4, pixel)), "whole"),
    )
    width = Width("channel", 6, tuple((cut,) for cut in cuts))
    weights = _weights(width)
    found = restructure(width, weights, [None] * 4, HALF, "magnitude")
    kept = list(found.kept)
    assert torch.equal(found.weights[0], weights[0][kept])
    assert torch.equal(found.weights[1], weights[1][kept])
    channels = weights[2].view(5, 6, 9)[:, kept]
    assert torch.equal(found.weights[2], channels.reshape(5, 27))
    assert torch.equal(found.weights[3], weights[3])


@settings(deadline=None)
@given(st.integers(0, 99), st.sampled_from([1, 3]))
def test_consumers_are_corrected_by_least_squares_whatever_the_method(seed, features):
    width, weights, inputs, moments = _case(seed, 6, features, (7, 4))
    for method in METHODS:
        found = restructure(width, weights, moments, HALF, method)
        for i, x in enumerate(map(_damped_inputs, inputs), 1):
            stay = width.cuts[i].places(found.kept, 6)
            target = x @ weights[i].double().T
            best = torch.linalg.lstsq(x[:, stay], target).solution.T
            torch.testing.assert_close(found.weights[i].double(), best, rtol=1e-5, atol=1e-6)


@settings(deadline=None)
@given(st.integers(0, 99), st.integers(1, 7))
def test_the_error_after_correction_is_that_of_the_schur_complement(seed, removed):
    weight, x = torch.randn(5, 8, generator=_random(seed)), _damped_inputs(_inputs(seed))
    h = x.T @ x
    stay, goes = list(range(8 - removed)), list(range(8 - removed, 8))
    given_up = weight[:, goes].double()
    schur = h[goes][:, goes] - h[goes][:, stay] @ h[stay][:, stay].inverse() @ h[stay][:, goes]
    undamped = _inputs(seed)
    values = corrected(weight, undamped.T @ undamped, torch.tensor(stay))
    expected = float(((given_up @ schur) * given_up).sum())
    assert _output_error(weight, x, stay, values) == pytest.approx(expected, rel=1e-5)


@settings(deadline=None)
@given(st.integers(0, 99), st.integers(1, 12), st.sets(st.integers(0, 7), min_size=1, max_size=7))
def test_the_correction_never_increases_the_error_of_the_outputs(seed, tokens, kept):
    weight, x, stay = torch.randn(5, 8, generator=_random(seed)), _inputs(seed, tokens), [*kept]
    values = corrected(weight, x.T @ x, torch.tensor(stay))
    before = _output_error(weight, x, stay, weight[:, stay])
    after = _output_error(weight, x, stay, values)
    scale = float((x @ weight.double().T).square().sum())
    assert after <= before + 1e-10 * scale


@SINGULAR
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("features", [1, 2])
def test_singular_moments_give_finite_weights_no_worse_than_uncorrected(kind, method, features):
    x = _singular(kind)
    width, weights, _, moments = _case(0, 8 // features, features, x=x)
    found = restructure(width, weights, moments, HALF, method)
    stay = width.cuts[1].places(found.kept, width.units)
    assert len(found.kept) == 4 // features and found.weights[1].isfinite().all()
    before = _output_error(weights[1], x, stay, weights[1][:, stay])
    after = _output_error(weights[1], x, stay, found.weights[1])
    assert after <= before * (1 + 1e-5) + 1e-10


@settings(deadline=None)
@given(st.floats(0, 100), st.integers(0, 9), st.sampled_from([1, 2]))
def test_an_indefinite_moment_gives_finite_weights(excess, seed, features):
    x = _inputs(seed, tokens=3)
    width, weights, _, (_, moment) = _case(seed, 8 // features, features, x=x)
    moment = moment - excess * moment.diagonal().mean() * torch.ones_like(moment) / 8
    for method in METHODS:
        found = restructure(width, weights, [None, moment], HALF, method)
        assert len(found.kept) == 4 // features and found.weights[1].isfinite().all()


def test_dead_inputs_keep_their_weights_and_those_of_repeated_ones_are_taken_over():
    x = _singular("repeated")
    x[:, [1, 5]] = 0
    weight = torch.randn(5, 8, generator=_random())
    values = corrected(weight, x.T @ x, torch.tensor([0, 1, 2, 3]))
    assert torch.equal(values[:, 1], weight[:, 1])
    torch.testing.assert_close(
        values[:, [0, 2, 3]], (weight[:, :4] + weight[:, 4:])[:, [0, 2, 3]], rtol=0, atol=0.1
    )


@settings(deadline=None)
@given(st.integers(0, 99), st.sampled_from([1, 2, 3]), st.sampled_from([(7,), (3, 6)]))
def test_obs_always_removes_the_unit_that_costs_least_after_the_best_update(
    seed, features, consumers
):
    width, weights, inputs, moments = _case(seed, 6, features, consumers)
    gone = []
    for unit in removed_units(width, weights, moments, 5, "obs"):
        losses = [
            torch.inf if other in gone else _loss_without(width, weights, inputs, {*gone, other})
            for other in range(6)
        ]
        assert losses[unit] <= min(losses) * (1 + 1e-9)
        gone.append(unit)


@settings(deadline=None)
@given(st.integers(0, 99), st.integers(1, 6))
def test_obs_of_uncorrelated_inputs_is_the_best_of_all_subsets(seed, removed):
    x = torch.linalg.qr(_inputs(seed, inputs=7)).Q * torch.arange(1, 8)
    width, weights, inputs, moments = _case(seed, 7, x=x)
    gone = removed_units(width, weights, moments, removed, "obs")
    best = min(
        _loss_without(width, weights, inputs, subset) for subset in combinations(range(7), removed)
    )
    assert _loss_without(width, weights, inputs, gone) == pytest.approx(best, rel=1e-9)


def test_obs_loses_least_of_all_methods():
    losses = {method: 0.0 for method in METHODS}
    for seed in range(20):
        width, weights, inputs, moments = _case(seed, 8, consumers=(7, 3))
        best = min(_loss_without(width, weights, inputs, s) for s in combinations(range(8), 4))
        for method in METHODS:
            gone = removed_units(width, weights, moments, 4, method)
            losses[method] += _loss_without(width, weights, inputs, gone) / best / 20
    assert 1 <= losses["obs"] < 1.1
    assert min(losses["magnitude"], losses["wanda"], losses["chip"]) > 1.1 * losses["obs"]


@settings(deadline=None)
@given(st.integers(0, 99), st.sampled_from([1, 3]))
def test_wanda_removes_the_units_that_add_least_to_the_outputs(seed, features):
    width, weights, inputs, moments = _case(seed, 6, features, (7, 4))
    added = torch.zeros(6, dtype=torch.float64)
    for weight, x in zip(weights[1:], inputs, strict=True):
        parts = x.view(-1, 6, features), weight.double().view(-1, 6, features)
        added += torch.einsum("tuf,ouf->tuo", *parts).square().sum((0, 2))
    expected = added.argsort()[:3].tolist()
    assert removed_units(width, weights, moments, 3, "wanda") == expected


@settings(deadline=None)
@given(st.integers(0, 99), st.integers(1, 20), st.integers(1, 12))
def test_independence_is_the_fall_of_the_nuclear_norm(seed, units, tokens):
    x = _inputs(seed, tokens, units)
    whole = torch.linalg.matrix_norm(x, "nuc")
    others = [x * (torch.arange(units) != unit) for unit in range(units)]
    falls = torch.stack([whole - torch.linalg.matrix_norm(other, "nuc") for other in others])
    torch.testing.assert_close(independence(x.T @ x), falls, rtol=1e-6, atol=float(1e-6 * whole))


def test_chip_takes_a_unit_of_several_features_as_one_row():
    width, weights, inputs, moments = _case(3, 6, 3)
    rows = inputs[0].view(-1, 6, 3).movedim(1, 0).reshape(6, -1)
    norms = [
        torch.linalg.matrix_norm(rows[[other for other in range(6) if other != unit]], "nuc")
        for unit in range(6)
    ]
    expected = torch.stack(norms).argsort(descending=True)[:4].tolist()
    assert removed_units(width, weights, moments, 4, "chip") == expected


def test_chip_adds_up_what_the_inputs_of_every_consumer_lose():
    width, weights, inputs, moments = _case(5, 8, consumers=(7, 4))
    falls = torch.zeros(8, dtype=torch.float64)
    for x in inputs:
        others = [x * (torch.arange(8) != unit) for unit in range(8)]
        falls -= torch.stack([torch.linalg.matrix_norm(other, "nuc") for other in others])
    expected = falls.argsort()[:7].tolist()
    assert removed_units(width, weights, moments, 7, "chip") == expected


@settings(deadline=None)
@given(st.integers(0, 99), st.sets(st.integers(0, 19), min_size=1), st.integers(1, 30))
def test_independence_of_zero_rows_is_exactly_zero(seed, dead, tokens):
    x = _inputs(seed, tokens, 20)
    x[:, [*dead]] = 0
    assert not independence(x.T @ x)[[*dead]].any()


def test_chip_of_orthogonal_units_is_their_norm():
    norms = torch.tensor([3.0, 0, 1e-3, 2, 1e3], dtype=torch.float64)
    torch.testing.assert_close(independence(torch.diag(norms**2)), norms, rtol=1e-9, atol=1e-9)


def test_magnitude_of_two_matrices_is_the_norm_of_the_units_part_of_their_product():
    made, read = _cut("up", "out", 6, 5), _cut("down", "in", 7, 6)
    width = Width("channel", 6, ((made,), (read,)))
    up, down = _weights(width)
    parts = [torch.outer(down[:, u], up[u]).norm() ** 2 for u in range(6)]
    found = magnitude(width, [up, down])
    torch.testing.assert_close((found / found[0]).float(), torch.stack(parts) / parts[0])


def test_magnitude_of_two_consumers_is_that_of_one_with_the_rows_of_both():
    made, gate, down = _weights(_width(6, 2, (7, 4)))
    both = magnitude(_width(6, 2, (7, 4)), [made, gate, down])
    one = magnitude(_width(6, 2, (11,)), [made, torch.cat([gate, down])])
    torch.testing.assert_close(both, one)


@settings(deadline=None)
@given(st.integers(0, 99), st.lists(st.floats(-20, 20), min_size=6, max_size=6))
def test_magnitude_does_not_see_a_units_rows_scaled_against_its_columns(seed, powers):
    width = Width("channel", 6, ((_cut("up", "out", 6, 5),), (_cut("down", "in", 7, 6),)))
    up, down = (weight.double() for weight in _weights(width, seed))
    scale = torch.tensor(powers, dtype=torch.float64).exp2()
    moved = [up * scale[:, None], down / scale]
    found = removed_units(width, moved, [None, None], 3, "magnitude")
    assert found == removed_units(width, [up, down], [None, None], 3, "magnitude")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("features", [1, 2])
def test_a_unit_that_is_always_zero_goes_first_and_costs_nothing(method, features):
    width, weights, (x, _), moments = _case(1, 6, features, (7, 4))
    dead = slice(4 * features, 5 * features)
    weights[0].view(2, -1, 5)[:, dead] = 0
    for weight, moment in zip(weights[1:], moments[1:], strict=True):
        weight[:, dead] *= 100
        moment[dead], moment[:, dead] = 0, 0
    found = restructure(width, weights, moments, Decimal(90), method)
    assert found.kept == (0, 1, 2, 3, 5)
    stay = width.cuts[1].places(found.kept, 6)
    torch.testing.assert_close(found.weights[1], weights[1][:, stay], rtol=0, atol=0)


@pytest.mark.parametrize("method", ["wanda", "obs"])
def test_where_no_input_is_live_the_units_of_least_weight_go(method):
    width, weights, _, moments = _case(1, 8, 2)
    expected = weights[1].square().sum(0).view(8, 2).sum(1).argsort()[:5].tolist()
    assert removed_units(width, weights, [None, moments[1] * 0], 5, method) == expected


@pytest.mark.parametrize("method", METHODS)
def test_of_equal_units_the_first_go(method):
    width = _width(8)
    weights = [
        torch.ones(cut.member.shape.out_features, cut.member.shape.in_features)
        for cut in width.cuts
    ]
    moments = [None, torch.eye(8, dtype=torch.float64)]
    assert removed_units(width, weights, moments, 3, method) == [0, 1, 2]


@settings(deadline=None)
@given(st.integers(0, 99), st.permutations(range(6)), st.sampled_from([1, 3]))
def test_a_permutation_of_the_units_permutes_the_answer(seed, order, features):
    width, weights, _, moments = _case(seed, 6, features)
    rows, columns = (torch.tensor(cut.places(order, 6)) for cut in width.cuts)
    other = [weights[0][rows], weights[1][:, columns]]
    moment = moments[1][columns[:, None], columns]
    for method in METHODS:
        gone = removed_units(width, weights, moments, 3, method)
        found = removed_units(width, other, [None, moment], 3, method)
        assert [order[unit] for unit in found] == gone


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_the_unit_of_the_inputs_does_not_matter(method, scale):
    width, weights, _, moments = _case(2, 8)
    one = restructure(width, weights, moments, HALF, method)
    other = restructure(width, weights, [None, moments[1] * scale], HALF, method)
    assert one.kept == other.kept
    torch.testing.assert_close(one.weights, other.weights)


@pytest.mark.parametrize("method", METHODS)
def test_restructuring_is_deterministic_and_leaves_its_arguments_alone(method):
    width, weights, _, moments = _case()
    before = [weight.clone() for weight in weights], moments[1].clone()
    one, other = (restructure(width, weights, moments, HALF, method) for _ in range(2))
    assert one.kept == other.kept and all(map(torch.equal, one.weights, other.weights))
    assert all(map(torch.equal, weights, before[0])) and torch.equal(moments[1], before[1])


@pytest.mark.parametrize("method", METHODS)
def test_what_stays_at_fewer_units_is_part_of_what_stays_at_more(method):
    width, weights, _, moments = _case(4, 8, 2)
    more, fewer = (restructure(width, weights, moments, Decimal(p), method) for p in (75, 25))
    assert set(fewer.kept) < set(more.kept)


def test_without_moments_consumers_only_lose_columns():
    width, weights, _, _ = _case(0, 8, 2)
    found = restructure(width, weights, [None, None], HALF, "magnitude")
    stay = width.cuts[1].places(found.kept, 8)
    assert torch.equal(found.weights[1], weights[1][:, stay])


def test_the_narrowed_moment_is_that_of_the_inputs_that_are_left():
    width, _, (x,), (_, moment) = _case(0, 8, 3)
    kept = (0, 3, 4, 7)
    left = x[:, width.cuts[1].places(kept, 8)]
    torch.testing.assert_close(narrowed_moment(width.cuts[1], moment, kept, 8), left.T @ left)
    entering = torch.eye(5, dtype=torch.float64)
    assert torch.equal(narrowed_moment(width.cuts[0], entering, kept, 8), entering)


@pytest.mark.parametrize("method", METHODS[1:])
def test_a_method_that_needs_statistics_says_so_where_there_are_none(method):
    width, weights, _, _ = _case()
    with pytest.raises(InvalidInput, match=f"{method} needs calibration statistics and down0 has"):
        restructure(width, weights, [None, None], HALF, method)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_and_moments_that_are_not_finite_are_refused(method, value):
    width, weights, _, moments = _case()
    broken = weights[0].clone()
    broken[1, 2] = value
    with pytest.raises(InvalidInput, match="weight of gate_up holds values that are not finite"):
        restructure(width, [broken, weights[1]], moments, HALF, method)
    moments[1][3, 4] = value
    with pytest.raises(InvalidInput, match="calibration inputs hold values that are not finite"):
        restructure(width, weights, moments, HALF, method)


def test_weights_and_moments_of_another_size_are_refused():
    width, weights, _, moments = _case()
    with pytest.raises(InvalidInput, match=r"weight of down0 is \[8, 7\], the layer \[7, 8\]"):
        restructure(width, [weights[0], weights[1].T], moments, HALF, "obs")
    with pytest.raises(InvalidInput, match=r"statistics of down0 are \[7, 7\], the layer has 8"):
        restructure(width, weights, [None, moments[1][:7, :7]], HALF, "obs")


def test_a_width_that_keeps_no_unit_is_refused():
    width, weights, _, moments = _case(0, 4)
    with pytest.raises(InvalidInput, match="c10% keeps none of 4 channels; at least c25%"):
        restructure(width, weights, moments, Decimal(10), "obs")


@settings(deadline=None)
@given(
    st.lists(st.sampled_from([0.0, 1e-300, 1.0, 2.0, 1e30]), min_size=2, max_size=9), st.integers()
)
def test_taylor_leaves_out_the_units_of_least_score_and_of_equal_ones_the_first(scores, seed):
    width = _width(len(scores))
    count = seed % len(scores)
    found = removed_units(width, [], [], count, "taylor", torch.tensor(scores, dtype=torch.float64))
    assert found == sorted(range(len(scores)), key=lambda unit: (scores[unit], unit))[:count]


def test_after_taylor_the_columns_that_stay_are_corrected_as_after_other_methods():
    width, weights, _, moments = _case(0, 8, 2)
    scores = torch.tensor([3, 0, 5, 1, 7, 2, 6, 4], dtype=torch.float64)
    found = restructure(width, weights, moments, HALF, "taylor", scores)
    assert found.kept == (2, 4, 6, 7)
    stay = torch.tensor(width.cuts[1].places(found.kept, 8))
    assert torch.equal(found.weights[1], corrected(weights[1], moments[1], stay))


@pytest.mark.parametrize(
    "scores, reason",
    [
        (None, "taylor needs gradients of the model's loss, and these channels have none; ask for"),
        (torch.ones(7), r"scores are \[7\], of 8 channels"),
        (torch.ones(8) / 0, "gradients of the model's loss are not finite"),
    ],
)
def test_taylor_without_scores_that_fit_is_refused(scores, reason):
    width, weights, _, moments = _case()
    with pytest.raises(InvalidInput, match=reason):
        restructure(width, weights, moments, HALF, "taylor", scores)
