"""The evaluator: losses do not depend on the slice, on what ran before, or on what is cached."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from apportion.errors import ApportionError, InvalidInput
from apportion.workers.evaluator import Evaluate, Evaluator
from apportion.workers.spec import WorkerSpec, build_evaluator

ATTENTION = "model.layers.{}.self_attn.q_proj+k_proj+v_proj"
MLP = "model.layers.{}.mlp"
DOWN = "model.layers.{}.mlp.down_proj"
CONFIGURATIONS = [
    {DOWN.format(2): "w4g32"},
    {DOWN.format(2): "s50%", ATTENTION.format(2): "bf16"},
    {ATTENTION.format(1): "w4g32"},
    {"model.layers.1": "drop"},
    {"model.layers.1": "drop", DOWN.format(2): "w4g32"},
    {"model.layers.0.self_attn": "drop", "model.layers.2.mlp": "drop"},
    {ATTENTION.format(0): "s50%", DOWN.format(0): "bf16"},
    {MLP.format(1): "c50%", DOWN.format(0): "w4g32"},
    {MLP.format(1): "c50%+w4g16", DOWN.format(2): "w4g32"},
    {MLP.format(1): "c50%+w4g16", MLP.format(2): "c50%", "model.layers.0": "drop"},
    {MLP.format(2): "drop", MLP.format(0): "c50%"},
    {MLP.format(2): "drop:mean", MLP.format(0): "c50%"},
    {"model.layers.1": "drop:mean", DOWN.format(2): "w4g32"},
    {DOWN.format(2): "w4g32"},
    {},
]
NO_CACHES = {"references": 0, "prefixes": 0, "realized": 0}


@pytest.fixture(scope="module")
def evaluator(spec: WorkerSpec) -> Evaluator:
    return build_evaluator(spec)


@pytest.fixture(scope="module")
def plain(spec: WorkerSpec) -> Evaluator:
    return build_evaluator(spec | {"budgets": NO_CACHES})


def losses(
    evaluator: Evaluator, configuration: dict[str, str], first: int = 0, windows: int = 20
) -> NDArray[np.float64]:
    result = evaluator.evaluate(Evaluate(configuration, "search", first, windows)).losses
    assert result is not None
    return result


def test_dense_against_dense_is_zero(evaluator: Evaluator) -> None:
    assert not losses(evaluator, {}).any()


def test_reuse_of_prefixes_changes_no_bit(evaluator: Evaluator, plain: Evaluator) -> None:
    for configuration in CONFIGURATIONS:
        reused, whole = losses(evaluator, configuration), losses(plain, configuration)
        np.testing.assert_array_equal(reused, whole)
        assert bool(configuration) == bool(reused.all())


def test_blocks_before_the_first_difference_do_not_run(evaluator: Evaluator) -> None:
    losses(evaluator, {})
    ran = []
    gates = evaluator._blocks.gates
    originals = [gate.forward for gate in gates]
    for place, gate in enumerate(gates):
        gate.forward = lambda *a, _p=place, **k: (ran.append(_p), originals[_p](*a, **k))[1]
    losses(evaluator, {DOWN.format(1): "s50%"}, 0, 4)
    for gate, forward in zip(gates, originals, strict=True):
        gate.forward = forward
    assert ran == [1, 2]


@pytest.mark.parametrize(("first", "windows"), [(0, 1), (3, 2), (5, 11), (19, 1)])
def test_slice_does_not_change_a_window(evaluator: Evaluator, first: int, windows: int) -> None:
    whole = losses(evaluator, CONFIGURATIONS[1])
    part = losses(evaluator, CONFIGURATIONS[1], first, windows)
    np.testing.assert_array_equal(part, whole[first : first + windows])


def test_budget_for_a_few_blocks_changes_no_bit(spec: WorkerSpec, plain: Evaluator) -> None:
    block_bytes = 4 * 16 * 32 * 4
    small = build_evaluator(spec | {"budgets": NO_CACHES | {"prefixes": 5 * block_bytes}})
    for configuration in CONFIGURATIONS:
        np.testing.assert_array_equal(losses(small, configuration), losses(plain, configuration))
    assert small._blocks.cache.used_bytes <= 5 * block_bytes


def test_void_sites_do_not_matter(evaluator: Evaluator) -> None:
    dropped = {"model.layers.1": "drop"}
    under = dropped | {DOWN.format(1): "w4g32"}
    np.testing.assert_array_equal(losses(evaluator, dropped), losses(evaluator, under))


def test_sites_under_a_narrower_sub_block_do_not_matter(evaluator: Evaluator) -> None:
    narrow = {MLP.format(1): "c50%"}
    under = narrow | {DOWN.format(1): "w4g32"}
    np.testing.assert_array_equal(losses(evaluator, narrow), losses(evaluator, under))


def test_narrower_sub_block_loses_what_zero_channels_lose(
    evaluator: Evaluator, spec: WorkerSpec
) -> None:
    from apportion.workers.spec import open_setting

    setting, name = open_setting(spec), MLP.format(1)
    kept = evaluator._store.bank.get(evaluator._store.index[name]["c50%"]).kept
    assert kept is not None and len(kept) == 32
    gone = sorted(set(range(64)) - set(kept))
    batch = evaluator.chunks("search")[0].batch
    with torch.inference_mode():
        dense = setting.opened.model(**batch)
        setting.opened.model.get_submodule(DOWN.format(1)).weight[:, gone] = 0
        sums, _ = setting.objective.measure(setting.opened.model(**batch), batch, dense)
    found = losses(evaluator, {name: "c50%"}, 0, 4)
    np.testing.assert_allclose(found, sums, rtol=1e-3)
    assert found.all()


def test_drop_for_a_constant_loses_what_the_constant_alone_loses(
    evaluator: Evaluator, spec: WorkerSpec
) -> None:
    from apportion.workers.spec import open_setting

    setting, name = open_setting(spec), MLP.format(1)
    constant = evaluator._store.bank.get(evaluator._store.index[name]["drop:mean"]).constant
    batch = evaluator.chunks("search")[0].batch
    with torch.inference_mode():
        dense = setting.opened.model(**batch)
        alone = lambda *_: constant.expand(*batch["input_ids"].shape, -1)  # noqa: E731
        setting.opened.model.get_submodule(name).register_forward_hook(alone)
        sums, _ = setting.objective.measure(setting.opened.model(**batch), batch, dense)
    np.testing.assert_array_equal(losses(evaluator, {name: "drop:mean"}, 0, 4), sums)
    assert np.all(losses(evaluator, {name: "drop"}, 0, 4) != sums)


def test_reference_semantics_equal_weights_written_back(
    evaluator: Evaluator, spec: WorkerSpec
) -> None:
    from apportion.kernels.reference import reference_weight
    from apportion.workers.spec import open_setting

    setting, name = open_setting(spec), DOWN.format(1)
    stored = evaluator._store.bank.get(evaluator._store.index[name]["w4g32"]).weights[0]
    batch = evaluator.chunks("search")[0].batch
    with torch.inference_mode():
        dense = setting.opened.model(**batch)
        setting.opened.model.get_submodule(name).weight.copy_(reference_weight(stored))
        sums, _ = setting.objective.measure(setting.opened.model(**batch), batch, dense)
    np.testing.assert_array_equal(losses(evaluator, {name: "w4g32"}, 0, 4), sums)


def test_loss_that_is_not_finite_is_a_failure(spec: WorkerSpec, tmp_path: Path) -> None:
    code = "def loss(o, b, r):\n    n = len(o.logits)\n    return [float('nan')] * n, [1] * n"
    (tmp_path / "loss.py").write_text(code)
    built = build_evaluator(spec | {"objective": f"python:{tmp_path / 'loss.py'}:loss"})
    result = built.evaluate(Evaluate({}, "search", 2, 3))
    assert result.losses is None
    assert result.failure == "the loss of window 2 is not finite"


def test_windows_that_are_not_there(evaluator: Evaluator) -> None:
    with pytest.raises(ApportionError, match="no windows 15 to 25"):
        evaluator.evaluate(Evaluate({}, "search", 15, 10))


def test_unknown_option(evaluator: Evaluator) -> None:
    with pytest.raises(InvalidInput, match="w2g64"):
        evaluator.evaluate(Evaluate({DOWN.format(0): "w2g64"}, "search", 0, 4))


def test_parts_do_not_mix(evaluator: Evaluator, plain: Evaluator) -> None:
    losses(evaluator, CONFIGURATIONS[0])
    work = Evaluate(CONFIGURATIONS[0], "heldout", 0, 8)
    np.testing.assert_array_equal(evaluator.evaluate(work).losses, plain.evaluate(work).losses)
    losses(evaluator, CONFIGURATIONS[0])


def test_check_refuses_a_model_that_predicts_at_chance(evaluator: Evaluator) -> None:
    with torch.no_grad():
        head = evaluator.model.get_input_embeddings().weight
        before = head.clone()
        head.mul_(100)
    evaluator._part = None
    with pytest.raises(InvalidInput, match=f"ln 320 = {math.log(320):.2f}"):
        evaluator.check()
    with torch.no_grad():
        head.copy_(before)
    evaluator._part = None
