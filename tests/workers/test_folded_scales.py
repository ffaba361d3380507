"""AWQ's scales in norms, made by a worker, swapped by the evaluator, loaded from a folder."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import apportion
from apportion.spaces.artifact import Plan, write
from apportion.spaces.batches import call
from apportion.spaces.calibration import collect
from apportion.spaces.folding import folded_rate
from apportion.spaces.statistics import write_statistics
from apportion.spaces.views import parameter_at
from apportion.workers.evaluator import Evaluate, Evaluator
from apportion.workers.realizer import Realize, Realizer
from apportion.workers.spec import WorkerSpec, build_evaluator, open_setting

SCALED, PLAIN, TREATED = "w3g16:awq", "w3g16", "c50%+w4g16:awq"
LAYERS = "model.layers.{}."
QKV = LAYERS + "self_attn.q_proj+k_proj+v_proj"
GATE_UP, MLP = LAYERS + "mlp.gate_proj+up_proj", LAYERS + "mlp"
CONFIGURATIONS = [
    {QKV.format(0): SCALED},
    {QKV.format(0): SCALED, GATE_UP.format(0): SCALED},
    {GATE_UP.format(0): SCALED},
    {QKV.format(0): PLAIN, GATE_UP.format(2): SCALED},
    {MLP.format(0): TREATED, QKV.format(0): SCALED},
    {MLP.format(0): "drop", GATE_UP.format(2): SCALED},
    {GATE_UP.format(2): SCALED},
    {},
]


@pytest.fixture(scope="module")
def folded_spec(spec: WorkerSpec, tmp_path_factory: pytest.TempPathFactory) -> WorkerSpec:
    """Two blocks with options of awq and without, their bank filled by the worker's own means."""
    folder = tmp_path_factory.mktemp("folded")
    layers = [LAYERS.format(place) + "*" for place in (0, 2)]
    made = spec | {
        "space": [[layers, ["dense", PLAIN, SCALED]], [["mlp:*"], ["keep", "drop", TREATED]]],
        "bank": str(folder / "bank"),
        "index": str(folder / "index.json"),
    }
    setting, realizer = open_setting(made), Realizer(open_setting(made), made)
    batches = [chunk.batch for chunk in setting.open_part("calibration").chunks(4)]
    seen = collect(setting.opened.model, setting.space.input_sites, batches)
    write_statistics(folder / "seen", seen)
    index: dict[str, dict[str, str]] = {}
    for place, (site, texts) in enumerate(
        zip(setting.space.sites, setting.space.texts, strict=True)
    ):
        keys = {
            text: f"{place:02}{text}".replace("%", "p")
            for text in texts
            if text not in ("dense", "keep", "drop")
        }
        index[site.name] = keys
        assert realizer.realize(Realize(site.name, keys, str(folder / "seen"))).failure is None
    Path(made["index"]).write_text(json.dumps(index))
    return made


def losses(evaluator: Evaluator, configuration: dict[str, str]) -> np.ndarray:
    found = evaluator.evaluate(Evaluate(configuration, "search", 0, 8)).losses
    assert found is not None
    return found


def test_options_take_each_other_back(folded_spec: WorkerSpec) -> None:
    """Whatever ran before, a configuration's loss is that of a fresh model, dense 0."""
    evaluator = build_evaluator(folded_spec)
    dense = {name: tensor.clone() for name, tensor in evaluator.model.state_dict().items()}
    found = [losses(evaluator, configuration) for configuration in CONFIGURATIONS]
    assert not found[-1].any() and all(each.all() for each in found[:-1])
    after = evaluator.model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in dense.items())
    for configuration, loss in zip(CONFIGURATIONS[:5], found, strict=False):
        fresh = build_evaluator(folded_spec | {"budgets": {"prefixes": 0, "realized": 0}})
        np.testing.assert_array_equal(losses(fresh, configuration), loss)


def test_norm_is_that_of_the_option(folded_spec: WorkerSpec) -> None:
    evaluator = build_evaluator(folded_spec)
    site = next(s for s in evaluator.space.sites if s.name == QKV.format(0))
    assert site.norm is not None
    (path,) = site.norm.paths
    before = parameter_at(evaluator.model, path)
    losses(evaluator, {site.name: SCALED})
    (vector,) = evaluator._store.bank.get(evaluator._store.index[site.name][SCALED]).norm
    assert torch.equal(parameter_at(evaluator.model, path), vector)
    assert folded_rate([before], [vector], site.norm.offset).std() > 0.01
    losses(evaluator, {site.name: PLAIN})
    assert parameter_at(evaluator.model, path) is before


def test_treatment_keeps_its_scales_inside(folded_spec: WorkerSpec) -> None:
    evaluator = build_evaluator(folded_spec)
    index, bank = evaluator._store.index, evaluator._store.bank
    treated = bank.get(index[MLP.format(0)][TREATED])
    assert all(weight.format.input_scaled for weight in treated.weights) and not treated.norm


def test_loaded_folder_loses_what_was_evaluated(folded_spec: WorkerSpec, tmp_path: Path) -> None:
    evaluator, setting = build_evaluator(folded_spec), open_setting(folded_spec)
    store, space = evaluator._store, setting.space
    chosen = {space.sites[place].name: SCALED for place in space.weight_sites}
    names = {name: {SCALED: "linear.f32"} for name in chosen}
    found = losses(evaluator, chosen)
    plan = Plan(
        space,
        space.canonical(chosen),
        lambda site, option: store.bank.get(store.index[site.name][str(option)]),
        names,
    )
    model, folder = setting.opened.model, tmp_path / "folder"
    source = {"kind": "hf", "source": "there", "revision": "1", "dtype": "float32"}
    write(folder, model, plan, source, {}, model.config.save_pretrained)
    batches = [chunk.batch for chunk in evaluator.chunks("search")[:2]]
    loaded = apportion.load(folder)
    with torch.inference_mode():
        pairs = [(call(loaded, batch), call(model, batch)) for batch in batches]
    sums = [
        setting.objective.measure(output, batch, dense)[0]
        for (output, dense), batch in zip(pairs, batches, strict=True)
    ]
    np.testing.assert_allclose(np.concatenate(sums), found, rtol=1e-3)
