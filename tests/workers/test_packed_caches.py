"""The evaluator with packed caches: no bit depends on what ran before, and all of them count."""

import numpy as np
import pytest
import torch

from apportion.spaces.apply import apply
from apportion.spaces.narrowing import shared_copy
from apportion.studies.evaluations import Naming
from apportion.workers.evaluator import Evaluate, Evaluator
from apportion.workers.spec import WorkerSpec, build_evaluator, open_setting

CACHE = "model.layers.{}.self_attn.cache"
ATTENTION = "model.layers.{}.self_attn"
CONFIGURATIONS = [
    {CACHE.format(2): "k4v4"},
    {CACHE.format(2): "k2v2", CACHE.format(0): "k4v4"},
    {CACHE.format(1): "k2v2", "model.layers.2.mlp": "drop"},
    {CACHE.format(1): "k2v2", ATTENTION.format(2): "drop"},
    {CACHE.format(2): "k4v4"},
    {CACHE.format(layer): "k2v2" for layer in range(3)},
]


@pytest.fixture(scope="module")
def cached(spec: WorkerSpec) -> WorkerSpec:
    data = spec["data"] | {"context": 40}
    space = [
        [["cache:*"], ["k4v4", "k2v2"]],
        [["attention:*", "mlp:*"], ["keep", "drop"]],
    ]
    return spec | {"data": data, "space": space}


@pytest.fixture(scope="module")
def evaluator(cached: WorkerSpec) -> Evaluator:
    return build_evaluator(cached)


def losses(evaluator: Evaluator, configuration: dict[str, str]) -> np.ndarray:
    found = evaluator.evaluate(Evaluate(configuration, "search", 0, 8)).losses
    assert found is not None
    return found


def test_reuse_of_prefixes_changes_no_bit(evaluator: Evaluator, cached: WorkerSpec) -> None:
    plain = build_evaluator(cached | {"budgets": {"references": 0, "prefixes": 0, "realized": 0}})
    for configuration in CONFIGURATIONS:
        reused = losses(evaluator, configuration)
        np.testing.assert_array_equal(reused, losses(plain, configuration))
        assert reused.all()
    assert not losses(evaluator, {}).any()


def test_loss_is_that_of_the_model_with_the_caches(
    evaluator: Evaluator, cached: WorkerSpec
) -> None:
    setting = open_setting(cached)
    chunk = setting.open_part("search").chunks(4)[0]
    inputs = setting.objective.inputs(chunk.batch)
    for configuration in CONFIGURATIONS:
        model = shared_copy(setting.opened.model)
        apply(model, setting.space, configuration, lambda *_: None, {})
        with torch.inference_mode():
            dense, output = (each(**inputs) for each in (setting.opened.model, model))
        wanted, _ = setting.objective.measure(output, chunk.batch, dense)
        np.testing.assert_allclose(losses(evaluator, configuration)[:4], wanted, rtol=1e-6)


def test_a_cache_under_dropped_attention_is_void(evaluator: Evaluator) -> None:
    alone = {ATTENTION.format(1): "drop"}
    np.testing.assert_array_equal(
        losses(evaluator, alone), losses(evaluator, alone | {CACHE.format(1): "k2v2"})
    )


def test_name_of_an_evaluation_holds_the_option() -> None:
    naming = Naming("model", {"search": "data"}, "kl", "one thread", {})
    names = {
        naming.key({CACHE.format(0): option}, "search", 0, 8) for option in ("keep", "k4v4", "k2v2")
    }
    assert len(names) == 3
    assert naming.key({CACHE.format(0): "keep"}, "search", 0, 8) == naming.key({}, "search", 0, 8)
