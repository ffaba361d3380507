"""What is checked before a study exists: model, data, space, limits, memory and disk."""

import shutil
import time
from typing import Any

from apportion.cost_models.cache_bytes import cache_bytes, has_caches
from apportion.cost_models.fingerprint import fingerprint, fingerprint_hash
from apportion.cost_models.outlook import outlook
from apportion.cost_models.requests import RequestItem
from apportion.cost_models.static import bits, site_bytes, weight_bytes
from apportion.errors import InvalidInput
from apportion.kernels.packed_cache import GROUP
from apportion.search.solvers.exact import infeasibility
from apportion.spaces.batches import call, no_gradients
from apportion.spaces.degenerate import check_finite
from apportion.spaces.gates import gate_scores
from apportion.spaces.space import DENSE, KEEP
from apportion.studies.cli.display import Display
from apportion.studies.cli.records import CheckReport, Need, OperatorCount
from apportion.studies.context import RANK_MULTIPLE, worker_spec
from apportion.studies.database.store import Store
from apportion.studies.home import Home
from apportion.studies.limits import CACHE_BYTES, amount
from apportion.studies.pricing import Prices
from apportion.studies.specification import StudySpec
from apportion.studies.stages.discover import check_choices
from apportion.studies.stages.gates import windows_at_once
from apportion.studies.starts import read_starts
from apportion.units import format_bytes
from apportion.workers.evaluator import Budgets
from apportion.workers.memory import available_bytes, memory_need
from apportion.workers.objectives import dense_loss
from apportion.workers.samples import PARTS, check_disjoint
from apportion.workers.spec import Setting, open_setting

CALIBRATION_BYTES_PER_INPUT = 8


def prepare(spec: StudySpec, home: Home, workers: int, display: Display) -> Setting:
    """Open everything that a study needs and refuse what cannot work, before it is created.

    Raises:
        InvalidInput: one line for what is wrong, with its place in the study file.
    """
    import torch

    torch.set_num_threads(spec.objective.threads)
    setting = open_setting(worker_spec(spec, home))
    samples = {part: setting.open_part(part) for part in PARTS}
    check_disjoint(samples)
    for found in samples.values():
        if found.note:
            display.warning(found.note)
    check_choices(setting.space)
    if has_caches(setting.space) and (spec.data.context or GROUP + 1) <= GROUP:
        display.warning(
            f"data.context: only tokens behind the first {GROUP} see rounded keys, so windows of "
            f"{spec.data.context} tell nothing of what their bits lose"
        )
    read_starts(spec, setting)
    check_finite(setting.opened.model, setting.space.sites)
    _check_limits(spec, setting)
    _check_loss(spec, setting)
    for what, need in (("memory", memory(spec, setting, workers)), ("disk", disk(setting, home))):
        if need["needed"] > need["free"]:
            needed, free = format_bytes(need["needed"]), format_bytes(need["free"])
            raise InvalidInput(f"{what}: this study needs {needed}, {free} are free")
    _check_gates(spec, setting)
    return setting


def check(spec: StudySpec, home: Home, display: Display) -> CheckReport:
    """What a study would do and need. Raises InvalidInput like `prepare`."""
    setting = prepare(spec, home, 1, display)
    space = setting.space
    cost = weight_bytes(setting.opened.model, space, RANK_MULTIPLE)
    structure = [place for place, site in enumerate(space.sites) if site.is_structure]
    kept = site_bytes(setting.opened.model, space, RANK_MULTIPLE)
    fixed = cost.base + sum(
        cost.rows[p, 0] - kept[p].get(KEEP, 0) for p in structure if not space.sites[p].choices
    )
    return CheckReport(
        sites=len(space.sites),
        weight_sites=len(space.weight_sites),
        structure_sites=len(structure),
        options=len({text for row in space.texts for text in row}),
        fixed_bytes=round(fixed),
        devices=_devices(spec, setting, home),
        memory=memory(spec, setting, 1),
        disk=disk(setting, home),
        search_seconds=_search_seconds(spec, setting),
        workers=1,
        warnings=[],
    )


def memory(spec: StudySpec, setting: Setting, workers: int) -> Need:
    """Bytes that all workers take, and what is free."""
    inputs = setting.objective.inputs(
        setting.open_part("search").chunks(spec.objective.batch)[0].batch
    )
    windows = max(min(spec.search.windows, setting.open_part("search").windows), 1)
    windows = max(windows, setting.open_part("heldout").windows)
    blocks = [site.name for site in setting.blocks]
    one = memory_need(setting.opened.model, blocks, inputs, windows, Budgets())
    parts = {
        "model": one.model,
        "dense outputs": one.references,
        "activations": one.activations,
        "caches": one.caches,
    }
    each = {name: size * workers for name, size in parts.items()}
    return Need(needed=one.total * workers, free=available_bytes(), parts=each)


def disk(setting: Setting, home: Home) -> Need:
    """Bytes that bank, cache and database take at most, and what is free."""
    stored = site_bytes(setting.opened.model, setting.space, RANK_MULTIPLE)
    bank = sum(size for row in stored for text, size in row.items() if text not in (DENSE, KEEP))
    seen = [site for site in setting.space.input_sites if site.unseen is None]
    inputs = [group[0].shape.in_features for site in seen for group in site.groups]
    cache = CALIBRATION_BYTES_PER_INPUT * sum(width * width for width in inputs)
    folder = next(p for p in (home.path, *home.path.parents) if p.exists())
    parts = {"bank": bank, "cache": cache}
    return Need(needed=bank + cache, free=shutil.disk_usage(folder).free, parts=parts)


def _check_limits(spec: StudySpec, setting: Setting) -> None:
    """Refuse unknown units, and limits on bytes that the smallest configuration does not meet."""
    model, space = setting.opened.model, setting.space
    stored = site_bytes(model, space, RANK_MULTIPLE)
    uniform = {text: space.uniform(text, stored) for text in space.uniform_texts}
    static = {
        "weight_bytes": weight_bytes(model, space, RANK_MULTIPLE),
        "bits": bits(model, space, RANK_MULTIPLE),
    }
    if has_caches(space):
        static[CACHE_BYTES] = cache_bytes(model, space, setting.sites)
    rows = {kind: cost.rows for kind, cost in static.items()}
    base = {kind: cost.base for kind, cost in static.items()}
    prices = Prices(space, rows, base, {}, uniform)
    for limit in spec.parsed_limits:
        if limit.unit is not None:
            try:
                prices.unit(limit.unit)
            except InvalidInput as error:
                raise InvalidInput(f"limits.{limit.kind}: {error}") from error
        if limit.kind not in static and limit.kind != CACHE_BYTES:
            continue
        found = infeasibility(prices.problem([limit], {}))
        if found is not None:
            raise InvalidInput(
                f"limits cannot be met: {limit.kind} "
                f"{amount(limit.kind, prices.limit_value(limit))}, the smallest configuration of "
                f"this space is {amount(limit.kind, found.minimum[limit.kind])}"
            )


@no_gradients()
def _check_loss(spec: StudySpec, setting: Setting) -> None:
    """Try the loss on the dense model, before anything is measured. Raises InvalidInput."""
    chunk = setting.open_part("search").chunks(spec.objective.batch)[0]
    output = call(setting.opened.model, setting.objective.inputs(chunk.batch))
    dense_loss(setting.objective, output, chunk.batch)


def _check_gates(spec: StudySpec, setting: Setting) -> None:
    """Try the gradients that `taylor` needs, before anything is measured. Raises InvalidInput."""
    if setting.space.gated_sites:
        chunk = setting.open_part("calibration").chunks(windows_at_once(spec))[0]
        gate_scores(setting.opened.model, setting.space.gated_sites, [chunk.batch])


def _devices(spec: StudySpec, setting: Setting, home: Home) -> dict[str, OperatorCount]:
    """How many operators of each device are measured already."""
    counts: dict[str, OperatorCount] = {}
    for name, device in spec.devices.items():
        if device.kind != "cpu":
            continue
        threads = device.threads or 1
        found = outlook(
            setting.opened.model,
            setting.space,
            [RequestItem.from_json(item.model_dump(exclude_none=True)) for item in device.request],
            setting.sample,
            threads=threads,
            known=_known(home, fingerprint_hash(fingerprint(threads))),
            rank_multiple=RANK_MULTIPLE,
        )
        counts[name] = OperatorCount(
            operators=found.operators, measured=found.measured, seconds=found.seconds
        )
    return counts


def _known(home: Home, device: str) -> dict[str, dict[str, Any]]:
    if home.database_url is None and not (home.path / "studies.db").is_file():
        return {}
    store = Store.open(home.database)
    try:
        return store.measurements(device)
    finally:
        store.close()


@no_gradients()
def _search_seconds(spec: StudySpec, setting: Setting) -> float:
    """The budget at the speed of one timed forward pass."""
    chunk = setting.open_part("search").chunks(spec.objective.batch)[0]
    inputs = setting.objective.inputs(chunk.batch)
    call(setting.opened.model, inputs)
    began = time.perf_counter()
    call(setting.opened.model, inputs)
    each = (time.perf_counter() - began) / chunk.windows
    tokens = (spec.data.context or 1) if spec.data.is_text else 1
    return each * spec.search.tokens / tokens
