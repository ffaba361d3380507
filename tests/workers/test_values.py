"""Fewer dimensions of heads made by a worker, evaluated by it, loaded from an exported folder."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import apportion
from apportion.kernels.padded import HeadStarts, PaddedHeads
from apportion.kernels.registry import serving
from apportion.spaces.artifact import Plan, write
from apportion.spaces.batches import call
from apportion.spaces.calibration import collect
from apportion.spaces.padding import ZEROS
from apportion.spaces.parts import parts
from apportion.spaces.statistics import write_statistics
from apportion.workers.evaluator import Evaluate, Evaluator
from apportion.workers.realizer import Realize, Realizer
from apportion.workers.spec import Setting, WorkerSpec, build_evaluator, open_setting

OPTIONS = ("v50%", "v50%+w8", "v75%:svd+w4g8", "q50%", "q75%:svd+w8")
SPACE = [[["attention:*"], ["keep", "drop", *OPTIONS]]]


@pytest.fixture(scope="module")
def values_spec(spec: WorkerSpec, tmp_path_factory: pytest.TempPathFactory) -> WorkerSpec:
    """A space of value and query-key dimensions, its bank filled by the worker's own means."""
    folder = tmp_path_factory.mktemp("values")
    made = spec | {
        "space": SPACE,
        "rank_multiple": 4,
        "bank": str(folder / "bank"),
        "index": str(folder / "index.json"),
    }
    setting, realizer = open_setting(made), Realizer(open_setting(made), made)
    batches = [chunk.batch for chunk in setting.open_part("calibration").chunks(4)]
    seen = collect(setting.opened.model, setting.space.input_sites, batches)
    write_statistics(folder / "seen", seen)
    index = {
        site.name: {text: f"{place:02}{text}".replace("%", "p") for text in OPTIONS}
        for place, site in enumerate(setting.space.sites)
    }
    for name, keys in index.items():
        assert realizer.realize(Realize(name, keys, str(folder / "seen"))).failure is None
    Path(made["index"]).write_text(json.dumps(index))
    return made


@pytest.mark.parametrize("ending", ["", ZEROS])
@pytest.mark.parametrize("text", OPTIONS)
def test_loaded_folder_loses_what_was_evaluated(
    values_spec: WorkerSpec, text: str, ending: str, tmp_path: Path
) -> None:
    evaluator, setting = build_evaluator(values_spec), open_setting(values_spec)
    work = Evaluate(dict.fromkeys(setting.space.names, text), "heldout", 0, 4)
    found = evaluator.evaluate(work).losses
    assert found is not None and (found > 1e-7).all()
    loaded = written(evaluator, setting, text, ending, tmp_path / "folder")
    pads = any(isinstance(module, PaddedHeads | HeadStarts) for module in loaded.modules())
    assert pads is (ending != ZEROS)
    chunk = evaluator.chunks("heldout")[0]
    with torch.inference_mode():
        dense, output = (call(model, chunk.batch) for model in (setting.opened.model, loaded))
    losses, _ = setting.objective.measure(output, chunk.batch, dense)
    np.testing.assert_allclose(losses[:4], found, rtol=1e-3, atol=2e-9)


def written(
    evaluator: Evaluator, setting: Setting, text: str, ending: str, folder: Path
) -> torch.nn.Module:
    """The model of an exported folder in which all attention is treated so, and so named."""
    space = setting.space
    names = {
        site.name: {
            str(option): serving(part.formats[0], part.shapes, "cpu")[0].name + ending
            for option in row
            if option.narrows
            for part in parts(site, option, "float32", 4)
        }
        for site, row in zip(space.sites, space.options, strict=True)
    }
    store = evaluator._store
    plan = Plan(
        space,
        space.canonical(dict.fromkeys(space.names, text)),
        lambda site, option: store.bank.get(store.index[site.name][str(option)]),
        names,
    )
    model = setting.opened.model
    source = {"kind": "hf", "source": "there", "revision": "1", "dtype": "float32"}
    write(folder, model, plan, source, {}, model.config.save_pretrained)
    return apportion.load(folder)
