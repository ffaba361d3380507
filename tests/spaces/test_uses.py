"""Uses: a parameter that a product takes as its matrix is a view, in the orientation it is used."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from apportion.spaces.uses import watched_views

IN, OUT, STACK = 8, 12, 3
# Each takes x [5, 8] and a weight, which is stored in the given orientation.
FLAT = {
    "linear": (lambda x, w: F.linear(x, w), False),
    "linear by name": (lambda x, w: F.linear(x, weight=w), False),
    "linear of a transpose": (lambda x, w: F.linear(x, w.T), True),
    "matmul": (lambda x, w: x @ w, True),
    "matmul of a transpose": (lambda x, w: torch.matmul(x, w.T), False),
    "from the left": (lambda x, w: w @ x.T, False),
    "transpose from the left": (lambda x, w: torch.mm(w.t(), x.T), True),
    "addmm": (lambda x, w: torch.addmm(torch.zeros(OUT), x, w), True),
    "a copy in another dtype": (lambda x, w: F.linear(x.double(), w.to(torch.float64)), False),
    "einsum": (lambda x, w: torch.einsum("bi,oi->bo", x, w), False),
    "einsum of the weight first": (lambda x, w: torch.einsum("io, bi -> bo", w, x), True),
    "a part": (lambda x, w: F.linear(x[:, :4], w[:, :4]), False),
}
STACKED = {
    "one expert": (lambda x, w: F.linear(x, w[1]), False),
    "one expert transposed": (lambda x, w: x @ w[torch.tensor(2)], True),
    "all": (lambda x, w: torch.bmm(x.expand(STACK, 5, IN), w), True),
    "all transposed": (lambda x, w: torch.bmm(x.expand(STACK, 5, IN), w.mT), False),
    "einsum": (lambda x, w: torch.einsum("bi,eio->ebo", x, w), True),
    "einsum of a list": (lambda x, w: torch.einsum("bi,eoi->ebo", [x, w]), False),
    "gathered": (lambda x, w: torch.bmm(w[torch.tensor([0, 2])], x.T.expand(2, IN, 5)), False),
}


class Uses(nn.Module):
    """A parameter and what is done with it."""

    def __init__(self, use, shape) -> None:
        super().__init__()
        self.use = use
        self.weight = nn.Parameter(torch.randn(shape), requires_grad=False)

    def forward(self, x):
        return self.use(x, self.weight)


def views_of(use, shape, inputs=IN, unseen=None):
    model, unseen = Uses(use, shape), {} if unseen is None else unseen
    own = dict(model.named_parameters())
    return watched_views(model, torch.randn(5, inputs), {""}, own, unseen)


@pytest.mark.parametrize("name", FLAT)
def test_watched_matrix_has_the_orientation_of_its_use(name):
    use, transposed = FLAT[name]
    (member,) = views_of(use, (IN, OUT) if transposed else (OUT, IN))["weight"]
    assert (member.shape.out_features, member.shape.in_features) == (OUT, IN)
    assert (member.transposed, member.index, member.path) == (transposed, None, "weight")
    assert member.written_back


@pytest.mark.parametrize("name", [n for n in FLAT if n != "addmm"])
def test_watched_square_matrix_has_the_orientation_of_its_use(name):
    use, transposed = FLAT[name]
    assert views_of(use, (IN, IN))["weight"][0].transposed == transposed


@pytest.mark.parametrize("name", STACKED)
def test_watched_stack_is_found_whole_with_one_use(name):
    use, transposed = STACKED[name]
    members = views_of(use, (STACK, IN, OUT) if transposed else (STACK, OUT, IN))["weight"]
    assert [m.path for m in members] == [f"weight.{index}" for index in range(STACK)]
    assert {(m.shape.out_features, m.shape.in_features, m.transposed) for m in members} == {
        (OUT, IN, transposed)
    }


@pytest.mark.parametrize(
    "use",
    [
        lambda x, w: x + w[:5, :IN],
        lambda x, w: F.embedding(torch.tensor([1, 2]), w) @ x.T,
        lambda x, w: torch.einsum("bi,oi->boi", x, w),
        lambda x, w: (
            torch.sparse.mm(x.to_sparse(), x.T)
            + torch.func.vmap(lambda row: row @ x)(x.T[:, :5]).sum()
        ),
        lambda x, w: x,
    ],
    ids=["added", "looked up", "no sum", "odd tensors", "unused"],
)
def test_watched_parameter_that_is_no_matrix_of_a_product_is_no_view(use):
    assert views_of(use, (OUT, IN)) == {}


SIDES = "the forward multiplies by it from both sides"
PARTS = "the forward multiplies by parts of it, or by it rearranged"


@pytest.mark.parametrize(
    ("use", "shape", "reason"),
    [
        (lambda x, w: F.linear(x, w) @ w, (OUT, IN), SIDES),
        (lambda x, w: F.linear(x[:, :4], w[:, :4]), (OUT, IN), PARTS),
        (lambda x, w: F.linear(x, w[1:5]), (OUT, IN), PARTS),
        (lambda x, w: F.linear(x, w[[1, 0, 2]][0, 2:]), (STACK, OUT, IN), None),
        (lambda x, w: F.linear(x, w.permute(1, 0, 2)[0]), (STACK, OUT, IN), PARTS),
        (lambda x, w: torch.einsum("bi,oi,b->bo", x, w, x[:, 0]), (OUT, IN), PARTS),
        (lambda x, w: torch.einsum("bi,oi->o", x, w), (OUT, IN), PARTS),
        (lambda x, w: torch.einsum("...i,oi->...o", x, w), (OUT, IN), None),
    ],
    ids=["both sides", "columns", "rows", "a copy's", "across", "three", "summed", "dots"],
)
def test_watched_matrix_whose_inputs_cannot_be_seen_says_why(use, shape, reason):
    unseen = {}
    views_of(use, shape, unseen=unseen)
    assert unseen.get("weight") == reason
