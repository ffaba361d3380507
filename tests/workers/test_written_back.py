"""The evaluator where weights are written back: losses like any other, dense again to the bit."""

import copy

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from apportion.kernels.reference import reference_weight
from apportion.spaces.apply import apply
from apportion.spaces.space import Space
from apportion.workers.evaluator import Evaluate, Evaluator
from apportion.workers.spec import WorkerSpec, build_evaluator

EXPERTS = "model.layers.{}.mlp.experts.{}"
CONFIGURATIONS = [
    {EXPERTS.format(1, "down_proj"): "w4g32"},
    {EXPERTS.format(2, "gate_up_proj"): "s50%", EXPERTS.format(2, "down_proj"): "w4g32"},
    {EXPERTS.format(1, "down_proj"): "s50%", "model.layers.0.self_attn.o_proj": "w4g32"},
    {"model.layers.1.mlp": "drop", EXPERTS.format(0, "down_proj"): "w4g32"},
    {EXPERTS.format(1, "down_proj"): "w4g32"},
]
NO_CACHES = {"references": 0, "prefixes": 0, "realized": 0}


@pytest.fixture(scope="module")
def evaluator(mixture_spec: WorkerSpec) -> Evaluator:
    return build_evaluator(mixture_spec)


@pytest.fixture(scope="module")
def plain(mixture_spec: WorkerSpec) -> Evaluator:
    return build_evaluator(mixture_spec | {"budgets": NO_CACHES})


def losses(evaluator: Evaluator, configuration: dict[str, str]) -> NDArray[np.float64]:
    result = evaluator.evaluate(Evaluate(configuration, "search", 0, 8))
    assert result.losses is not None, result.failure
    return result.losses


def test_reuse_of_prefixes_changes_no_bit(evaluator: Evaluator, plain: Evaluator) -> None:
    for configuration in CONFIGURATIONS:
        reused = losses(evaluator, configuration)
        np.testing.assert_array_equal(reused, losses(plain, configuration))
        assert reused.all()


def test_dense_again_is_the_same_parameter(evaluator: Evaluator) -> None:
    losses(evaluator, {})
    dense = dict(evaluator.model.named_parameters())
    values = {name: parameter.clone() for name, parameter in dense.items()}
    losses(evaluator, CONFIGURATIONS[1])
    assert not losses(evaluator, {}).any()
    for name, parameter in evaluator.model.named_parameters():
        assert parameter is dense[name] and torch.equal(parameter, values[name])


def test_realized_bytes_are_bounded(plain: Evaluator) -> None:
    losses(plain, CONFIGURATIONS[1])
    held = plain._store._held
    assert len(held) == 1 and plain._store.used_bytes == sum(r.nbytes for r in held.values())


def test_evaluated_model_is_the_applied_one(evaluator: Evaluator) -> None:
    losses(evaluator, {})
    model, space = copy.deepcopy(evaluator.model), evaluator.space
    configuration = space.canonical({EXPERTS.format(1, "down_proj"): "w4g32"})
    store = evaluator._store
    apply(model, space, configuration, lambda site, o: store._stored(site, str(o)), {})
    losses(evaluator, configuration)
    own = dict(evaluator.model.named_parameters())
    assert all(torch.equal(p, own[name]) for name, p in model.named_parameters())
    assert _is_reference(evaluator, space)


def _is_reference(evaluator: Evaluator, space: Space) -> bool:
    """Whether each expert of the written stack holds what is stored for it."""
    name = EXPERTS.format(1, "down_proj")
    stored = evaluator._store._stored(space.sites[space.index(name)], "w4g32").weights
    stack = evaluator.model.get_parameter(name)
    return all(torch.equal(stack[e], reference_weight(s)) for e, s in enumerate(stored))
