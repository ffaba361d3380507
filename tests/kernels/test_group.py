import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import Tensor, nn

from apportion.kernels.group import GroupMember, joined_bias, members, resident_bytes


class Counting(nn.Module):
    """x -> x, 10 x, 100 x; counts its runs."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("factors", torch.tensor([1.0, 10.0, 100.0]))
        self.runs = 0

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        self.runs += 1
        return tuple(x * factor for factor in self.factors.tolist())


@pytest.fixture
def operator() -> Counting:
    return Counting()


@pytest.fixture
def parts(operator: Counting) -> list[GroupMember]:
    return members(operator, 3)


def test_operator_runs_once_for_one_input(operator: Counting, parts: list[GroupMember]) -> None:
    x = torch.ones(2)
    assert [float(part(x)[0]) for part in parts] == [1, 10, 100]
    assert operator.runs == 1


@pytest.mark.parametrize("order", [(2, 0, 1), (1, 2, 0), (0, 0, 1, 2, 2, 1), (1, 1, 1)])
def test_any_order_and_repetition_is_right(parts: list[GroupMember], order: list[int]) -> None:
    x = torch.ones(2)
    assert [float(parts[index](x)[0]) for index in order] == [10**index for index in order]


def test_each_pass_over_the_same_input_runs_again(
    operator: Counting, parts: list[GroupMember]
) -> None:
    x = torch.ones(2)
    for _ in range(3):
        assert [float(part(x)[0]) for part in parts] == [1, 10, 100]
    assert operator.runs == 3


def test_input_changed_in_place_runs_again(parts: list[GroupMember]) -> None:
    x = torch.ones(2)
    assert float(parts[0](x)[0]) == 1
    x.add_(1)
    assert float(parts[1](x)[0]) == 20
    x[:1].add_(1)
    assert float(parts[2](x)[0]) == 300


def test_equal_inputs_are_not_the_same_input(operator: Counting, parts: list[GroupMember]) -> None:
    parts[0](torch.ones(2))
    parts[1](torch.ones(2))
    assert operator.runs == 2


def test_output_changed_in_place_stays_with_its_member(parts: list[GroupMember]) -> None:
    x = torch.ones(2)
    parts[0](x).zero_()
    assert float(parts[1](x)[0]) == 10 and float(parts[0](x)[0]) == 1


def test_growing_context_is_always_fresh(operator: Counting, parts: list[GroupMember]) -> None:
    """A loop like generation's: a new tensor each step, at an address that was just freed."""
    for step in range(1, 20):
        x = torch.full((2,), float(step))
        assert [float(part(x)[0]) for part in parts] == [step, 10 * step, 100 * step]
        del x
    assert operator.runs == 19


def test_outputs_of_a_gone_input_are_dropped(parts: list[GroupMember]) -> None:
    x = torch.ones(2)
    output = weakref.ref(parts[0](x))
    assert output() is None
    waiting = parts[0].shared._waiting
    assert len(waiting) == 2
    del x
    assert not waiting


def test_changes_are_seen_under_inference_mode_too(parts: list[GroupMember]) -> None:
    with torch.inference_mode():
        x = torch.ones(2)
        parts[0](x)
        x.add_(1)
        assert float(parts[1](x)[0]) == 20


def test_copies_share_one_operator_of_their_own(
    operator: Counting, parts: list[GroupMember]
) -> None:
    model = nn.ModuleDict({name: part for name, part in zip("qkv", parts, strict=True)})
    x = torch.ones(2)
    model["q"](x)
    copied = copy.deepcopy(model)
    copied["q"].operator.factors.mul_(2)
    assert [float(copied[name](x)[0]) for name in "qkv"] == [2, 20, 200]
    assert copied["q"].operator.runs == 2 and operator.runs == 1
    assert [float(model[name](x)[0]) for name in "kv"] == [10, 100] and operator.runs == 1


def test_pickled_members_still_share(parts: list[GroupMember]) -> None:
    parts[0](torch.ones(2))
    loaded = pickle.loads(pickle.dumps(nn.ModuleList(parts)))
    x = torch.ones(2)
    assert [float(part(x)[0]) for part in loaded] == [1, 10, 100]
    assert loaded[0].operator.runs == 2


def test_state_holds_the_operator_once(operator: Counting, parts: list[GroupMember]) -> None:
    model = nn.ModuleList(parts)
    assert list(model.state_dict()) == ["0.operator.factors"]
    assert resident_bytes(model) == resident_bytes(operator) == 12


def test_nothing_is_kept_alive_by_cycles() -> None:
    parts = members(Counting(), 3)
    x = torch.ones(2)
    parts[0](x)
    watched = weakref.ref(parts[0].operator)
    gc.disable()
    try:
        del parts
        assert watched() is None
    finally:
        gc.enable()


def test_single_member_keeps_nothing(operator: Counting) -> None:
    (part,) = members(operator, 1)
    x = torch.ones(2)
    assert float(part(x)[0]) == float(part(x)[0]) == 1
    assert operator.runs == 2 and not part.shared._waiting


def test_shared_storage_is_counted_once() -> None:
    module = nn.Linear(4, 4, bias=False)
    module.register_buffer("view", module.weight.data[:2])
    assert resident_bytes(module) == 64


def test_joined_bias_is_zero_where_there_is_none() -> None:
    joined = joined_bias([None, torch.ones(2)], [3, 2])
    assert joined is not None and joined.tolist() == [0, 0, 0, 1, 1]
    assert joined_bias([None, None], [3, 2]) is None
