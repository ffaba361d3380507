"""What fewer experts cost: bytes of files that are really written, and the time of all experts."""

import itertools
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from apportion.cost_models.profile import measure_profile
from apportion.cost_models.random_weights import random_weights
from apportion.cost_models.requests import RequestItem
from apportion.cost_models.rows import shape_of
from apportion.cost_models.session import Timing
from apportion.cost_models.static import resident_cost, weight_bytes
from apportion.spaces.artifact import Plan, contents
from apportion.spaces.batches import frozen
from apportion.spaces.discovery import discover
from apportion.spaces.entries import Entry, build_space
from apportion.spaces.space import Space

WIDTH, INNER, EXPERTS = 16, 8, 4


class Mixture(nn.Module):
    """Each token to two of four experts with biases, and a shared one."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.experts = nn.ModuleList(self.expert() for _ in range(EXPERTS))
        self.shared = self.expert()

    @staticmethod
    def expert() -> nn.Module:
        return nn.Sequential(nn.Linear(WIDTH, INNER), nn.ReLU(), nn.Linear(INNER, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, WIDTH)
        gates, chosen = self.gate(rows).softmax(-1).topk(2, -1)
        result = self.shared(rows)
        for number, expert in enumerate(self.experts):
            token, slot = torch.where(chosen == number)
            result = result.index_add(0, token, expert(rows[token]) * gates[token, slot, None])
        return result.reshape(x.shape)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = Mixture()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(x)


@pytest.fixture
def mixture() -> nn.Module:
    torch.manual_seed(0)
    return frozen(nn.Sequential(Block(), Block()))


@pytest.fixture
def sample() -> Tensor:
    return torch.randn(2, 8, WIDTH, generator=torch.Generator().manual_seed(0))


def space_of(model: nn.Module, sample: Tensor, *entries: Entry) -> Space:
    return build_space(discover(model, sample).sites, entries)


TREATMENTS = Entry(("mlp:*",), ("keep", "drop", "c75%", "c50%+w4g8"))


@pytest.mark.parametrize("weights", [(), (Entry(("*",), ("dense", "bf16")),)])
def test_weight_bytes_of_fewer_experts_equal_the_written_file(
    mixture, sample, weights, tmp_path: Path
) -> None:
    space = space_of(mixture, sample, TREATMENTS, *weights)
    cost, shape = weight_bytes(mixture, space), shape_of(space)
    stored = random_weights(space, "float32", 8)
    names = {s.name: dict.fromkeys(t, "linear.f32") for s, t in zip(space.sites, space.texts,
                                                                    strict=True)}  # fmt: skip
    mlps = [site.name for site in space.sites if site.is_structure]
    for texts in itertools.product(("keep", "drop", "c75%", "c50%+w4g8"), repeat=2):
        chosen = dict(zip(mlps, texts, strict=True))
        plan = Plan(space, space.canonical(chosen), stored, names)
        save_file(contents(mixture, plan)[0], tmp_path / "model.safetensors")
        written = sum(t.nbytes for t in load_file(tmp_path / "model.safetensors").values())
        assert cost.base + shape.total(cost.rows, space.config(chosen)) == written, chosen


def test_resident_bytes_of_fewer_experts_are_those_of_the_dense_ones_left(mixture, sample) -> None:
    space = space_of(mixture, sample, TREATMENTS)
    cost = resident_cost(mixture, space, {})
    expert, logit = 4 * (2 * WIDTH * INNER + WIDTH + INNER), 4 * WIDTH
    assert cost.rows[0, 2] == 3 * (expert + logit) + expert  # and the shared one
    assert cost.rows[0, 3] == 2 * (expert + logit) + expert


def test_fewer_experts_take_the_time_of_all_and_say_so(mixture, sample) -> None:
    space = space_of(mixture, sample, TREATMENTS)
    store: dict = {}
    profile = measure_profile(
        mixture, space, [RequestItem("forward", batch=2)], sample, known={}, record=store.update,
        threads=1, timing=Timing(operator_seconds=0.005, model_seconds=0.01), configurations=12,
    )  # fmt: skip
    assert profile.uncredited["0.mlp"] == ["c75%", "c50%+w4g8"]
    assert profile.implementations == {}
    keep, drop, *fewer = profile.rows[0]
    assert fewer == [keep, keep] and keep > drop
    experts = [key for key, kept in store.items() if "c75%" in str(kept.get("subject"))]
    assert experts, "a whole model with fewer experts is another work than the dense one"
