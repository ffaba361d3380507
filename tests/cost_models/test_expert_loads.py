"""What listed experts cost: the time of their expected tokens, in the steps that run them."""

import pytest
import torch
from torch import Tensor, nn

from apportion.cost_models.expert_loads import expected_loads, like_modules
from apportion.cost_models.measured import measure_item
from apportion.cost_models.planning import observed, plan_item, shares_of
from apportion.cost_models.profile import make_context
from apportion.cost_models.requests import RequestItem
from apportion.cost_models.rows import choose, item_rows
from apportion.cost_models.session import Session, Timing
from apportion.spaces.batches import frozen
from apportion.spaces.discovery import discover
from apportion.spaces.entries import Entry, build_space
from apportion.spaces.space import Space

WIDTH, INNER, EXPERTS, CHOSEN = 16, 8, 4, 2
QUICK = Timing(operator_seconds=0.003, model_seconds=0.003)


class Mixture(nn.Module):
    """Each token to two of four experts; an expert without tokens is not run."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, EXPERTS)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, INNER), nn.ReLU(), nn.Linear(INNER, WIDTH))
            for _ in range(EXPERTS)
        )

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, WIDTH)
        gates, chosen = self.gate(rows).softmax(-1).topk(CHOSEN, -1)
        result = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            token, slot = torch.where(chosen == number)
            if len(token):
                added = expert(rows[token]) * gates[token, slot, None]
                result = result.index_add(0, token, added)
        return result.reshape(x.shape)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = Mixture()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(x)


@pytest.fixture
def mixture() -> nn.Module:
    """Expert 3 is hardly ever chosen, expert 0 nearly always."""
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block())
    model[0].mlp.gate.bias.data = torch.tensor([3.0, 0.0, 0.0, -9.0])
    return frozen(model)


@pytest.fixture
def sample() -> Tensor:
    return torch.randn(8, 32, WIDTH, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def space(mixture, sample) -> Space:
    return build_space(discover(mixture, sample).sites, [Entry(("linear:*",), ("dense", "w8"))])


def counted(mixture: nn.Module, x: Tensor) -> Tensor:
    """Tokens that each expert is given."""
    chosen = mixture[0].mlp.gate(x.reshape(-1, WIDTH)).topk(CHOSEN, -1).indices
    return torch.bincount(chosen.flatten(), minlength=EXPERTS)


def test_shares_are_those_of_the_data_and_one_token_that_all_share(mixture, sample, space) -> None:
    counts, tokens = counted(mixture, sample).double(), sample[..., 0].numel()
    assert counts[3] == 0, "an expert that the data do not reach"
    shares = shares_of(mixture, space, sample)
    expected = (counts + CHOSEN / EXPERTS) / (tokens + 1)
    told = [shares[f"0.mlp.experts.{number}"] for number in range(EXPERTS)]
    assert told == pytest.approx(expected.tolist())
    assert sum(told) == pytest.approx(CHOSEN)


@pytest.mark.parametrize("tokens", [1, 3, 64])
def test_layers_are_given_expected_tokens_in_the_steps_that_run_them(
    mixture, sample, space, tokens: int
) -> None:
    shares = shares_of(mixture, space, sample)
    step = sample.reshape(1, -1, WIDTH)[:, :tokens]
    seen = observed(mixture, space, lambda: mixture(step))
    given, active = expected_loads(like_modules(mixture), shares, seen, list(space.names))
    drawn = torch.rand(40_000, tokens, generator=torch.Generator().manual_seed(1))
    for number in range(EXPERTS):
        name = f"0.mlp.experts.{number}"
        sent = (drawn < shares[name]).sum(1)
        often = float((sent > 0).double().mean())
        assert active[f"{name}.0"] == active[f"{name}.2"] == pytest.approx(often, abs=0.01)
        rows, features = given[f"{name}.0"].shape
        assert features == WIDTH and given[f"{name}.2"].shape == (rows, INNER)
        if often > 0.01:
            mean = float(sent[sent > 0].double().mean())
            assert mean / 1.5 < rows < mean * 1.5
        assert rows & (rows - 1) == 0, "a power of two: few operators are timed"


def test_all_listed_experts_cost_what_they_take_in_the_steps_that_run_them(
    mixture, sample, space
) -> None:
    session = Session({}, lambda found: None, QUICK, 0, lambda done, total: None)
    context = make_context(mixture, space, sample, 1, 8, {"cache_bytes": 1 << 20}, session)
    item = RequestItem("forward", batch=1)
    times = measure_item(context, plan_item(context, item))
    rows, _ = item_rows(space, times, choose(space, [times], "float32"))
    often = []
    for number in range(EXPERTS):
        place = space.names[f"0.mlp.experts.{number}.0"]
        (operator,) = times.plan.originals[place]
        often.append(times.plan.active[place])
        assert rows[place, 0] == pytest.approx(times.operators[operator.key][0] * often[-1])
        assert rows[place, 1] > 0
    assert often[0] > 0.99 and often[3] < 0.1


def test_lists_whose_modules_are_given_every_token_hold_no_experts(sample) -> None:
    layers = nn.Module()
    layers.stack = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
    layers.forward = lambda x: layers.stack[2](layers.stack[0](x))
    space = build_space(discover(layers, sample).sites, [Entry(("linear:*",), ("dense", "w8"))])
    assert len(like_modules(layers)) == 3
    assert shares_of(frozen(layers), space, sample) == {}


def test_a_model_without_lists_is_not_run_for_shares(sample) -> None:
    class Refuses(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise AssertionError("run")

    assert shares_of(Refuses(), Space((), ()), sample) == {}
