"""Profile: what every option costs, in bytes and in milliseconds measured on each device."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from apportion.cost_models.cache_bytes import cache_bytes, has_caches
from apportion.cost_models.fingerprint import doubt, fingerprint, fingerprint_hash
from apportion.cost_models.profile import Profile, measure_profile
from apportion.cost_models.recorded import read_recorded
from apportion.cost_models.requests import RequestItem
from apportion.cost_models.static import bits, resident_cost, site_bytes, struck, weight_bytes
from apportion.cost_models.table import CostTable, Rows, padded
from apportion.errors import InvalidInput
from apportion.spaces.space import Config, Space
from apportion.studies.cli.display import Stage
from apportion.studies.context import RANK_MULTIPLE, Context, Output, worker_spec
from apportion.studies.evaluations import Stopped
from apportion.studies.limits import CACHE_BYTES
from apportion.studies.pricing import Prices, latency_kind
from apportion.studies.specification.sections import Device
from apportion.studies.starts import Start, without_starts
from apportion.workers.device_lock import processor_lock
from apportion.workers.device_timing import fingerprint_on, run_timing_on
from apportion.workers.timing import Send, run_timing


def run(context: Context, starts: Sequence[Start] = ()) -> Output:
    """Measure every device; strike options that gain nothing on any and are in none of `starts`.

    Raises:
        InvalidInput: a recorded device lacks a measurement, or the model cannot do the request.
        Stopped: the user asked to stop; what was measured is stored.
    """
    space = context.setting.space
    profiles = {name: _profile(context, name, d) for name, d in context.spec.devices.items()}
    static = weight_bytes(context.model, space, RANK_MULTIPLE)
    found = struck(space, static, list(profiles.values()))
    return {
        "profiles": {name: profile.to_json() for name, profile in profiles.items()},
        "struck": without_starts(found, starts),
    }


def uniform_configs(model: nn.Module, space: Space) -> dict[str, Config]:
    """Every weight option and treatment everywhere, in the order of the study file."""
    stored = site_bytes(model, space, RANK_MULTIPLE)
    return {text: space.uniform(text, stored) for text in space.uniform_texts}


def _profile(context: Context, name: str, device: Device) -> Profile:
    is_recorded = device.kind == "recorded"
    with context.display.stage("profile") as bar:
        try:
            profile = (
                _recorded(context, device) if is_recorded else _measured(context, name, device, bar)
            )
        except InvalidInput as reason:
            raise InvalidInput(f"devices.{name}: {reason}") from reason
        error = f"{100 * profile.mean_error:.1f} %"
        how = "recorded" if is_recorded else "measured"
        where = f"'{name}' " if len(context.spec.devices) > 1 else ""
        bar.end(
            f"{where}{profile.operators} operators {how}, median "
            f"±{100 * profile.operator_width:.1f} % · whole model within {error} "
            f"({len(profile.measured)} configurations)"
        )
    line = doubt(profile.conditions)
    if line is not None and not is_recorded:
        context.display.warning(line)
    return profile


def _recorded(context: Context, device: Device) -> Profile:
    recorded = read_recorded(Path(device.file or ""))
    threads = int(recorded.fingerprint["threads"])
    if device.threads not in (None, threads):
        raise InvalidInput(f"threads: {device.threads}, but it was recorded with {threads}")
    space = context.setting.space
    return measure_profile(
        context.model,
        space,
        [RequestItem.from_json(item) for item in request_of(device)],
        context.setting.sample,
        threads=threads,
        known=recorded.measurements,
        record=lambda batch: None,
        seed=context.spec.study.seed,
        uniforms=list(uniform_configs(context.model, space).values()),
        timing=None,
        fingerprint=recorded.fingerprint,
        rank_multiple=RANK_MULTIPLE,
    )


def request_of(device: Device) -> list[dict[str, Any]]:
    """A device's request as JSON."""
    return [item.model_dump(mode="json", exclude_none=True) for item in device.request]


def _measured(context: Context, name: str, device: Device, bar: Stage) -> Profile:
    threads = device.threads or 1
    key = fingerprint_hash(fingerprint_of(context, name, threads))

    def hear(message: dict[str, Any]) -> None:
        if "record" in message:
            context.store.record_measurements(key, message["record"])
        if "progress" in message:
            bar.update(*message["progress"])
        if context.stop.is_set():
            raise Stopped

    job = {
        "kind": "profile",
        "worker": worker_spec(context.spec, context.home),
        "request": request_of(device),
        "known": context.store.measurements(key),
        "seed": context.spec.study.seed,
        "uniforms": list(uniform_configs(context.model, context.setting.space).values()),
    }
    return Profile.from_json(timed(context, name, job, threads, hear, bar.update))


def fingerprint_of(context: Context, name: str, threads: int) -> dict[str, Any]:
    """Of the machine that has the device: a node of the cluster, or this one."""
    cluster = context.cluster
    node = None if cluster is None else cluster.node_of(name)
    if cluster is None or node is None:
        return fingerprint(threads)
    return fingerprint_on(cluster, node, threads)


def timed(
    context: Context, name: str, job: dict[str, Any], threads: int, hear: Send, update: Any
) -> dict[str, Any]:
    """Run a timing job where its device is, alone there.

    Raises:
        InvalidInput, ApportionError: like `run_timing`.
        Stopped: the user asked to stop.
    """
    cluster = context.cluster
    node = None if cluster is None else cluster.node_of(name)
    if cluster is None or node is None:
        log = context.home.log(context.spec.study.name)
        with processor_lock().exclusive(lambda: waiting(context, update)):
            return run_timing(job, threads, hear, log)

    def go_on() -> None:
        if context.stop.is_set():
            raise Stopped

    def wait() -> None:
        waiting(context, update)

    return run_timing_on(cluster, node, name, job, threads, hear, wait, go_on)


def waiting(context: Context, update: Any) -> None:
    """Told while another process holds the processor. Raises Stopped."""
    if context.stop.is_set():
        raise Stopped
    update(0, 1, "waiting: another study evaluates or times on the device")


def prices(context: Context, output: Output) -> Prices:
    """The costs of the space that is left after striking, for solvers and reports."""
    profiles = {name: Profile.from_json(p) for name, p in output["profiles"].items()}
    space = context.setting.space.without(output["struck"])
    model = context.model
    first = next(iter(profiles.values()))
    static = {
        "weight_bytes": weight_bytes(model, space, RANK_MULTIPLE),
        "resident_bytes": resident_cost(model, space, first.implementations, RANK_MULTIPLE),
        "bits": bits(model, space, RANK_MULTIPLE),
    }
    if has_caches(space):
        static[CACHE_BYTES] = cache_bytes(model, space, context.setting.sites)
    tables = {name: _table(profile, space) for name, profile in profiles.items()}
    rows = {kind: cost.rows for kind, cost in static.items()}
    base = {kind: cost.base for kind, cost in static.items()}
    for name, table in tables.items():
        rows[latency_kind(name)], base[latency_kind(name)] = table.rows, table.base
    return Prices(space, rows, base, tables, uniform_configs(context.model, space))


def _table(profile: Profile, space: Space) -> CostTable:
    """A profile's table for the sites and options that are left after striking."""
    texts = dict(zip(profile.sites, profile.options, strict=True))

    def chosen(values: tuple[tuple[float, ...], ...]) -> Rows:
        by_site = dict(zip(profile.sites, values, strict=True))
        return padded(
            [
                [by_site[site.name][texts[site.name].index(text)] for text in left]
                for site, left in zip(space.sites, space.texts, strict=True)
            ]
        )

    return CostTable(chosen(profile.rows), chosen(profile.upper), profile.base, profile.margin)


def implementations(output: Output) -> dict[str, dict[str, str]]:
    """Site -> option -> implementation, as the first device's profile chose."""
    profile = next(iter(output["profiles"].values()))
    chosen: dict[str, dict[str, str]] = profile["implementations"]
    return chosen
