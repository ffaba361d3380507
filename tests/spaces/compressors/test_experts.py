"""Fewer experts: which go, and what a merged one is."""

import pytest
import torch
from torch import nn

from apportion.kernels.formats import LayerShape
from apportion.spaces.compressors.experts import alignment, merged, removed_experts, similarities
from apportion.spaces.layouts import reordered
from apportion.spaces.routing import Routing
from apportion.spaces.sites import Cut, Member

HIDDEN, INNER = 8, 6
FORMS = ("listed", "stacked", "in turns")


def routing(counts, added, logits=None) -> Routing:
    gram = torch.eye(len(counts), dtype=torch.float64) if logits is None else logits.T @ logits
    return Routing(gram, torch.tensor(counts).double(), torch.tensor(added).double(), 10)


def test_experts_that_add_least_go_and_of_equal_ones_the_first():
    seen = routing([1, 5, 5, 5], [3.0, 1.0, 2.0, 1.0])
    assert removed_experts([], seen, 3, "drop") == [1, 3, 2]
    assert removed_experts([], seen, 2, "merge") == [0, 1]


def test_without_statistics_experts_of_least_norms_go():
    experts = [[torch.full((2, 2), a), torch.full((2, 2), b)] for a, b in ((1, 9), (2, 2), (3, 1))]
    experts = [[m.float() for m in expert] for expert in experts]
    assert removed_experts(experts, None, 2, "magnitude") == [2, 1]


def test_likeness_of_experts_is_the_cosine_of_their_logits():
    logits = torch.randn(30, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = nn.functional.cosine_similarity(logits.T[:, None], logits.T[None], dim=-1)
    torch.testing.assert_close(similarities(logits.T @ logits), expected)


def channels(form: str) -> tuple[Cut, ...]:
    """How the matrices of a gated expert hold its channels."""
    inner = Cut(Member("down", LayerShape(HIDDEN, INNER)), "in")
    joint = Member("gate_up", LayerShape(2 * INNER, HIDDEN))
    match form:
        case "stacked":
            return Cut(joint, "out", 1, 2), inner
        case "in turns":
            return Cut(joint, "out", 2, 1), inner
    single = (Cut(Member(name, LayerShape(INNER, HIDDEN)), "out") for name in ("gate", "up"))
    return (*single, inner)


def reorderings(cuts):
    """The matrices of two experts that compute the same, and the order that the other has."""
    generator = torch.Generator().manual_seed(2)
    first = [
        torch.randn(c.member.shape.out_features, c.member.shape.in_features, generator=generator)
        for c in cuts
    ]
    order = torch.randperm(INNER, generator=generator)
    pairs = zip(first, cuts, strict=True)
    other = [reordered(matrix, cut, order.tolist()) for matrix, cut in pairs]
    return first, other, order


@pytest.mark.parametrize("form", FORMS)
def test_alignment_undoes_another_order_of_the_channels(form):
    cuts = channels(form)
    first, other, order = reorderings(cuts)
    assert alignment(first, other, cuts) == order.argsort().tolist()
    for matrix, back, cut in zip(first, other, cuts, strict=True):
        assert reordered(back, cut, order.argsort().tolist()).equal(matrix)


@pytest.mark.parametrize("form", FORMS)
def test_merge_is_the_mean_by_how_often_each_was_chosen_in_the_order_of_what_stays(form):
    cuts = channels(form)
    first, other, _ = reorderings(cuts)
    third = [matrix.flip(0) for matrix in first]
    changed = [matrix + 0.01 for matrix in other]
    logits = torch.tensor([[3.0, 3.1, -1.0], [1.0, 0.9, 2.0]], dtype=torch.float64)
    seen = routing([30, 10, 20], [1.0, 1.0, 1.0], logits)
    left = merged([first, changed, third], cuts, seen, (0, 2))
    assert left[1] == third
    for mean, matrix in zip(left[0], first, strict=True):
        torch.testing.assert_close(mean, matrix + 0.01 * 10 / 40)


def test_expert_that_no_other_was_chosen_beside_stays_as_it_is():
    cuts = channels("listed")
    first, other, _ = reorderings(cuts)
    left = merged([first, other], cuts, routing([0, 0], [0.0, 0.0]), (1,))
    assert left == [other]
