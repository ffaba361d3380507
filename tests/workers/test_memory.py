"""Memory: the model's bytes are exact, budgets bound the rest."""

from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest
import torch
from torch import nn

from apportion.workers.evaluator import Budgets
from apportion.workers.memory import (
    available_bytes,
    memory_need,
    model_bytes,
    share_bytes,
    total_bytes,
)


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


@pytest.mark.parametrize(
    ("own", "file", "limit", "expected"),
    [
        ("0::/a/b", "a/memory.max", "1000", 1000),
        ("0::/a/b", "a/b/memory.max", "max", None),
        ("4:memory:/a", "memory/a/memory.limit_in_bytes", "2000", 2000),
        ("4:memory:/a", "memory/a/memory.limit_in_bytes", "9223372036854771712", None),
        ("3:cpuset:/a", "memory/a/memory.limit_in_bytes", "2000", None),
    ],
)
def test_control_group_bounds_the_memory(
    tmp_path: Path, own: str, file: str, limit: str, expected: int | None
) -> None:
    (tmp_path / "own").write_text(own + "\n")
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_text(limit + "\n")
    found = total_bytes(tmp_path, tmp_path / "own")
    assert found == (expected or psutil.virtual_memory().total)


def test_shares_of_all_workers_fit_into_the_machine() -> None:
    assert 0 < share_bytes(3) * 3 < total_bytes()
