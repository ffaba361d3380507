"""Memory: the model's bytes are exact, budgets bound the rest."""

import torch
from torch import nn

from apportion.workers.evaluator import Budgets
from apportion.workers.memory import available_bytes, memory_need, model_bytes


def test_shared_parameters_count_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    assert model_bytes(model) == 4 * 4 * 4


def test_need_grows_with_windows_up_to_the_budgets() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    inputs, budgets = torch.ones(2, 8), Budgets(references=1000, prefixes=0, realized=0)
    few, many = (memory_need(model, [], inputs, windows, budgets) for windows in (2, 10**6))
    assert few.references == 2 * 8 * 4
    assert many.references == 1000
    assert few.activations >= 2 * 2 * 8 * 4
    assert few.total < many.total


def test_some_memory_is_available() -> None:
    assert available_bytes() > 10**8
