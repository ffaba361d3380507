"""Products: what a matrix is multiplied with, of each of a stack by itself, equals an oracle."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from apportion.spaces.batches import call, frozen
from apportion.spaces.calibration import collect
from apportion.spaces.discovery import discover
from apportion.spaces.products import factors

IN, OUT, STACK, TOKENS = 8, 12, 3, 5
EXPERTS = "model.layers.{}.mlp.experts.{}"
IDS = torch.tensor([2, 0, 2, 2, 0])
ENDS = torch.tensor([2, 2, 5], dtype=torch.int32)
# Each takes x [5, 8] and a stack, which is stored as [3, 12, 8] or as [3, 8, 12]; of each matrix
# the rows of x that it is multiplied with.
EVERYTHING, NOTHING = [0, 1, 2, 3, 4], []
USES = {
    "one": (lambda x, w: F.linear(x, w[1]), False, [NOTHING, EVERYTHING, NOTHING]),
    "by its number": (lambda x, w: x @ w[torch.tensor(2)], True, [NOTHING, NOTHING, EVERYTHING]),
    "one from the left": (lambda x, w: w[0] @ x.T, False, [EVERYTHING, NOTHING, NOTHING]),
    "some rows": (lambda x, w: F.linear(x[1:3], w[2]), False, [NOTHING, NOTHING, [1, 2]]),
    "a vector": (lambda x, w: torch.matmul(w[1], x[3]), False, [NOTHING, [3], NOTHING]),
    "all": (lambda x, w: x @ w, True, [EVERYTHING] * 3),
    "all transposed": (lambda x, w: torch.bmm(x.expand(3, 5, 8), w.mT), False, [EVERYTHING] * 3),
    "a slice": (
        lambda x, w: torch.bmm(x.expand(2, 5, 8), w[1:]), True, [NOTHING] + [EVERYTHING] * 2
    ),
    "copied": (lambda x, w: x.double() @ w[1:].double(), True, [NOTHING] + [EVERYTHING] * 2),
    "gathered": (
        lambda x, w: torch.bmm(w[IDS], x.unsqueeze(-1)), False, [[1, 4], NOTHING, [0, 2, 3]]
    ),
    "gathered in two dimensions": (
        lambda x, w: x[:, None, None] @ w[IDS[:, None].expand(5, 2)], True,
        [[1, 1, 4, 4], NOTHING, [0, 0, 2, 2, 3, 3]],
    ),
    "selected": (
        lambda x, w: torch.baddbmm(
            torch.zeros(5, 1, OUT), x[:, None], torch.index_select(w, 0, IDS)
        ), True, [[1, 4], NOTHING, [0, 2, 3]],
    ),
    "grouped": (
        lambda x, w: torch._grouped_mm(x, w, offs=ENDS), True, [[0, 1], NOTHING, [2, 3, 4]]
    ),
    "einsum": (lambda x, w: torch.einsum("bi,eoi->ebo", x, w), False, [EVERYTHING] * 3),
    "einsum of each": (
        lambda x, w: torch.einsum("ebi,eio->ebo", x[:3, None], w), True, [[0], [1], [2]]
    ),
    "einsum with dots": (
        lambda x, w: torch.einsum("...ei,eio->...eo", x[None, :3], w), True, [[0], [1], [2]]
    ),
}  # fmt: skip


class Uses(nn.Module):
    """A stack and what is done with it."""

    def __init__(self, use, shape) -> None:
        super().__init__()
        self.use = use
        self.weight = nn.Parameter(torch.randn(shape))

    def forward(self, x):
        return self.use(x, self.weight)


def moment(rows):
    return rows.double().T @ rows.double()


@pytest.mark.parametrize("name", USES)
def test_matrix_of_a_stack_has_the_moment_of_its_own_inputs(name):
    use, transposed, expected = USES[name]
    model = frozen(Uses(use, (STACK, IN, OUT) if transposed else (STACK, OUT, IN)))
    batches = [torch.randn(TOKENS, IN) for _ in range(2)]
    (site,) = discover(model, batches[0]).sites
    assert site.unseen is None
    sums = collect(model, [site], batches)
    assert [*sums] == [f"weight.{place}" for place in range(STACK)]
    for found, rows in zip(sums.values(), expected, strict=True):
        oracle = sum(moment(batch[rows]) for batch in batches)
        torch.testing.assert_close(found.second_moment, oracle, rtol=1e-5, atol=1e-6)
        seen = torch.cat([batch[rows].reshape(-1, IN) for batch in batches])
        largest = seen.abs().amax(0) if len(seen) else torch.zeros(IN)
        torch.testing.assert_close(found.peak, largest)
        assert found.tokens == 2 * len(rows)


def experts_given(model, batch):
    """Of each block what its experts are given: hidden states, and which experts take them."""
    given = []
    hooks = [
        layer.mlp.experts.register_forward_pre_hook(lambda _, args: given.append(args[:2]))
        for layer in model.model.layers
    ]
    with torch.no_grad():
        call(model, batch)
    for hook in hooks:
        hook.remove()
    return given


@pytest.mark.parametrize("way", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_expert_has_the_moment_of_the_tokens_that_the_router_sends(
    make_model, make_batch, family, way
):
    model, batch = make_model(family), make_batch(family)
    model.set_experts_implementation(way)
    sums = collect(model, discover(model, batch).sites, [batch])
    for block, (hidden, chosen) in enumerate(experts_given(model, batch)):
        experts = model.model.layers[block].mlp.experts
        for place in range(4):
            rows = hidden[(chosen == place).any(-1)].double()
            found = sums[EXPERTS.format(block, "gate_up_proj") + f".{place}"]
            torch.testing.assert_close(found.second_moment, moment(rows), rtol=1e-4, atol=1e-4)
            weight = experts.gate_up_proj[place].double()
            if family == "gpt_oss":
                inner = rows @ weight + experts.gate_up_proj_bias[place]
            else:
                inner = rows @ weight.T
            inner = experts._apply_gate(inner)
            again = sums[EXPERTS.format(block, "down_proj") + f".{place}"]
            torch.testing.assert_close(again.second_moment, moment(inner), rtol=1e-4, atol=1e-4)
            assert found.tokens == again.tokens == len(rows)
    assert sum(sums[EXPERTS.format(0, "down_proj") + f".{n}"].tokens for n in range(4)) == (
        chosen.numel()
    )


def test_grouped_product_without_the_kernel_is_read_like_it():
    x, stack = torch.randn(TOKENS, IN), torch.randn(STACK, IN, OUT)
    found = [*factors("grouped_mm_fallback", (x, stack), {"offs": ENDS})]
    (factor,) = [each for each in found if each.tensor is stack]
    rows = dict(factor.rows(torch.arange(STACK)))
    assert [len(rows[place]) for place in range(STACK)] == [2, 0, 3]
    assert not factor.inputs_last and torch.equal(rows[2], x[2:])


def test_layer_that_is_called_twice_has_both_inputs():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(IN, IN)

        def forward(self, x):
            return self.layer(torch.relu(self.layer(x)))

    model, x = frozen(Twice()), torch.randn(2, TOKENS, IN)
    (site,) = discover(model, x).sites
    rows = torch.cat([x, torch.relu(model.layer(x))]).reshape(-1, IN)
    found = collect(model, [site], [x])[site.name]
    assert site.written_back and found.tokens == 4 * TOKENS
    torch.testing.assert_close(found.second_moment, moment(rows), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("packed", [False, True])
def test_recurrent_layer_shows_what_its_input_side_is_multiplied_with(packed):
    model = frozen(nn.Sequential(nn.LSTM(IN, 4, 2, bidirectional=True, batch_first=True)))
    x = torch.randn(2, TOKENS, IN)
    batch = nn.utils.rnn.pack_padded_sequence(x, [5, 3], batch_first=True) if packed else x
    rows = torch.cat([x[0], x[1, :3]]) if packed else x.reshape(-1, IN)
    sites = discover(model, x).sites
    told = {site.name: site.unseen for site in sites if site.unseen}
    sums = collect(model, sites, [(batch,)])
    assert [*sums] == ["0.weight_ih_l0", "0.weight_ih_l0_reverse"]
    for found in sums.values():
        torch.testing.assert_close(found.second_moment, moment(rows), rtol=1e-5, atol=1e-5)
        assert found.tokens == len(rows)
    assert len(told) == 6
    assert set(told.values()) == {"LSTM multiplies by it where nobody sees what with"}


def test_product_in_the_other_orientation_adds_nothing():
    model = frozen(Uses(lambda x, w: F.linear(x, w[0]), (STACK, IN, IN)))
    x = torch.randn(TOKENS, IN)
    (site,) = discover(model, x).sites
    model.use = lambda x, w: x @ w[0]
    assert collect(model, [site], [x])["weight.0"].tokens == 0


def test_parts_of_a_matrix_add_nothing():
    shape = (STACK, OUT, IN)
    model = frozen(Uses(lambda x, w: F.linear(x, w[1]), shape))
    x = torch.randn(TOKENS, IN)
    (site,) = discover(model, x).sites
    model.use = lambda x, w: F.linear(x, w[1]).sum() + F.linear(x, w[2, :4]).sum()
    assert [found.tokens for found in collect(model, [site], [x]).values()] == [0, TOKENS, 0]
