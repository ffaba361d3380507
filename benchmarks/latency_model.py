"""How well does the profile predict the latency of whole models that it was not fitted to?

Formula.     predicted = (base + the corrected rows of a configuration) / dense; measured = median
             of paired ratios to the dense model, timed in the same run. MAPE = mean |predicted /
             measured - 1| over 30 configurations, none of which the correction was fitted to, one
             from each of 30 even strata of predicted latency, from fastest to slowest. Spearman:
             of predicted and measured, against that of two measurements of the same 30.
             Constant predictor: the one ratio of least MAPE on these very measurements.
Assumptions. One request item at a time: prefill of 128 tokens, and one decode step after 100.
             Random weights: values do not change what an operator takes. The shipped model, and
             a wide one (2 blocks, 1024 x 4096, 256 tokens of vocabulary) in which operators, not
             Python, take the time.
Ceiling.     The measurement itself: the same configuration measured twice differs by "repeat MAPE".

Run: .venv/bin/python benchmarks/latency_model.py, on a quiet machine. A cell (model, request) that
the same code has measured on the same device is not measured again.
"""

import json
import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import torch
from _report import HOME, ROOT, Claim, at_least, at_most, code, table, write
from numpy.typing import NDArray
from scipy.stats import spearmanr
from torch import nn

from apportion.cost_models.fingerprint import fingerprint, fingerprint_hash
from apportion.cost_models.measured import measure_item
from apportion.cost_models.operators import model_dtype
from apportion.cost_models.planning import plan_item
from apportion.cost_models.profile import CONFIGURATIONS, Profile, make_context, measure_profile
from apportion.cost_models.requests import RequestItem
from apportion.cost_models.rows import alike_options, choose, item_rows, shape_of
from apportion.cost_models.sampling import Config, stratified
from apportion.cost_models.session import Session, Stored
from apportion.cost_models.static import site_bytes
from apportion.cost_models.whole_model import compare_models, configured
from apportion.hashing import content_hash
from apportion.spaces.batches import frozen
from apportion.spaces.compressors.compose import RANK_MULTIPLE
from apportion.spaces.discovery import discover
from apportion.spaces.entries import Entry, build_space
from apportion.spaces.space import DENSE, Space
from apportion.studies.specification import load
from apportion.workers.device_lock import processor_lock
from apportion.workers.processes import THREAD_VARIABLES
from apportion.workers.sources import open_model

STUDY_FILE = ROOT / "examples" / "demo" / "study.toml"
MODELS = ("shipped", "wide")
REQUESTS = {
    "prefill 128": RequestItem("prefill", tokens=128),
    "decode at 100": RequestItem("decode", context=100),
}
THREADS = 2
COUNT = 30
SECONDS = 1.0  # for each configuration and measurement
FITTED_SEED, FRESH_SEED = 0, 1
Row = dict[str, Any]
Floats = NDArray[np.float64]


def opened(name: str) -> nn.Module:
    """The shipped model, or a wide one with random weights."""
    if name == "shipped":
        model = load(STUDY_FILE).model
        return open_model(model.source, model.dtype, ROOT).model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=2,
        num_attention_heads=16,
        num_key_value_heads=16,
        max_position_embeddings=128,
    )
    return frozen(LlamaForCausalLM(config))


def options_of(model: nn.Module, sample: dict[str, torch.Tensor]) -> Space:
    """The demo's options at the model's sites."""
    entries = [Entry(e.sites, e.options, skip_unfit=True) for e in load(STUDY_FILE).space]
    return build_space(discover(model, sample).sites, entries, RANK_MULTIPLE)


def uniforms(model: nn.Module, space: Space) -> list[Config]:
    """Every weight option everywhere: a study's profile is fitted to them too."""
    stored = site_bytes(model, space, RANK_MULTIPLE)
    texts = dict.fromkeys(t for place in space.weight_sites for t in space.texts[place])
    return [space.uniform(text, stored) for text in texts if text != DENSE]


def fresh_configurations(
    model: nn.Module,
    space: Space,
    item: RequestItem,
    sample: dict[str, torch.Tensor],
    profile: Profile,
    known: dict[str, Stored],
) -> list[Config]:
    """30 configurations, spread evenly over predicted latency, that the profile never saw."""
    quiet = Session(known, lambda batch: None, None, FITTED_SEED, lambda done, total: None)
    device = profile.fingerprint
    context = make_context(model, space, sample, THREADS, RANK_MULTIPLE, device, quiet)
    times = measure_item(context, plan_item(context, item))
    choice, shape = choose(space, [times], model_dtype(model)), shape_of(space)
    rows, _ = item_rows(space, times, choice)
    alike = alike_options(choice, rows)

    def spread(table: Floats, count: int, seed: int, given: Sequence[Config]) -> list[Config]:
        return stratified(table, shape, alike, count, np.random.default_rng(seed), given)

    fitted = spread(rows, CONFIGURATIONS, FITTED_SEED, uniforms(model, space))
    return spread(profile.table.rows, len(fitted) + COUNT, FRESH_SEED, fitted)[len(fitted) :]


def measure(name: str, request: str) -> Row:
    """One cell: profile, then 30 other configurations, each measured twice."""
    model, item = opened(name), REQUESTS[request]
    sample = {"input_ids": torch.arange(128)[None] % model.config.vocab_size}
    space, known = options_of(model, sample), dict[str, Stored]()
    with processor_lock().exclusive(lambda: None):
        profile = measure_profile(
            model,
            space,
            [item],
            sample,
            threads=THREADS,
            known={},
            record=known.update,
            seed=FITTED_SEED,
            uniforms=uniforms(model, space),
        )
        configs = fresh_configurations(model, space, item, sample, profile, known)
        names = profile.implementations
        build = {
            str(place): partial(
                configured, model, space, space.configuration(config), names, RANK_MULTIPLE
            )
            for place, config in enumerate(configs)
        }
        passes = [
            compare_models(
                build, model, [item], sample, threads=THREADS, seconds=SECONDS, seed=seed
            )
            for seed in range(2)
        ]
    first, second = (np.array([found[n].ratio for n in build]) for found in passes)
    shape, rows = shape_of(space), profile.table.rows
    predicted = np.array([profile.base + shape.total(rows, c) for c in configs]) / profile.dense_ms
    return judged(predicted, first, second) | {
        "model": name,
        "request": request,
        "dense_ms": profile.dense_ms,
        "margin": profile.margin,
        "conditions": profile.conditions,
        "configurations": [space.configuration(config) for config in configs],
    }


def judged(predicted: Floats, first: Floats, second: Floats) -> Row:
    """Errors and rank correlations of ratios to dense [configurations]."""
    constant = min(error(np.full_like(first, value), first) for value in first)
    return {
        "mape": error(predicted, first),
        "constant_mape": constant,
        "repeat_mape": error(second, first),
        "spearman": float(spearmanr(predicted, first).statistic),
        "repeat_spearman": float(spearmanr(second, first).statistic),
        "predicted": predicted.tolist(),
        "measured": first.tolist(),
        "repeated": second.tolist(),
    }


def error(predicted: Floats, measured: Floats) -> float:
    """MAPE in percent. As a function of a constant it is least at one of the measurements."""
    return 100 * float(np.mean(np.abs(predicted / measured - 1)))


def cell(name: str, request: str) -> Row:
    """A cell's row, measured at most once by the same code on the same device."""
    made_by = code("kernels", "spaces", "cost_models", "benchmarks/latency_model.py")
    key = content_hash([name, request, made_by, fingerprint_hash(fingerprint(THREADS))])
    path = HOME / "latency_model" / f"{key}.json"
    if not path.is_file():
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as child:
            row = child.submit(measure, name, request).result()
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_text(json.dumps(row))
        part.replace(path)
    return dict(json.loads(path.read_text()))


def claims(row: Row) -> list[Claim]:
    """The three bounds of a cell."""
    where = f"{row['model']}, {row['request']}"
    least = row["repeat_spearman"] - 0.03
    return [
        at_most(f"{where}: MAPE", row["mape"], "%", 8.0),
        at_most(f"{where}: MAPE / constant's", row["mape"] / row["constant_mape"], "x", 1 / 3),
        at_least(f"{where}: Spearman, repeated - 0.03", row["spearman"], "", least),
    ]


def told(row: Row) -> list[str]:
    """A row as text."""
    shares = [f"{row[key]:.1f} %" for key in ("mape", "constant_mape", "repeat_mape")]
    ranks = [f"{row[key]:.3f}" for key in ("spearman", "repeat_spearman")]
    span = f"{min(row['measured']):.2f} to {max(row['measured']):.2f}"
    return [row["model"], row["request"], f"{row['dense_ms']:.2f}", span, *shares, *ranks]


def main() -> None:
    """Measure what is missing, then print and write."""
    # Read by the processes that measure, before they import torch.
    os.environ.update(dict.fromkeys(THREAD_VARIABLES, str(THREADS)))
    rows = []
    for name in MODELS:
        for request in REQUESTS:
            print(f" {name}, {request}", flush=True)
            rows.append(cell(name, request))
    columns = ("model", "request", "dense ms", "measured / dense", "MAPE", "constant", "repeat",
               "Spearman", "repeated")  # fmt: skip
    table(columns, [told(row) for row in rows])
    write("latency_model", THREADS, rows, [claim for row in rows for claim in claims(row)])


if __name__ == "__main__":
    main()
