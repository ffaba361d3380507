"""Verify: load an exported folder in fresh processes, and compare with what was promised."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from apportion.errors import ApportionError, InvalidInput
from apportion.studies.cli.records import Latency, Verification
from apportion.workers.processes import THREAD_VARIABLES

SAME_PATH = 1e-6
OTHER_PATH_SHARE = 0.01
OTHER_PATH_NATS = 1e-4
LATENCY_SECONDS = 3.0
LATENCY_SHARE = 0.10


def verify(folder: str | Path) -> Verification:
    """Evaluate the artifact on the held-out data and time it, each in a process of its own.

    Raises:
        InvalidInput: no artifact, or its model or data cannot be opened any more.
        ApportionError: a process failed.
    """
    folder = Path(folder).absolute()
    report = _report(folder)
    found = _child({"kind": "loss", "folder": str(folder)}, report["evaluation"]["threads"])
    latency: dict[str, Latency] = {}
    for name, device in report["devices"].items():
        promised = report["point"]["latency_ms"][name]
        measured = None
        if device["kind"] == "cpu":
            job = {"kind": "latency", "folder": str(folder), "device": name}
            measured = _child(job, device["threads"] or 1)["milliseconds"]
        expected = promised["measured"] or promised["predicted"]
        latency[name] = Latency(predicted=expected, measured=measured)
    promised_loss = report["point"]["loss_heldout"]
    difference = abs(found["loss"] - promised_loss)
    allowed = _allowed(promised_loss, found["same_path"])
    verification = Verification(
        ok=difference <= allowed,
        loss=report["objective"].upper() if report["objective"] == "kl" else "loss",
        loss_found=found["loss"],
        loss_promised=promised_loss,
        loss_difference=found["loss"] - promised_loss,
        weight_bytes=found["weight_bytes"],
        latency_ms=latency,
    )
    if not verification["ok"]:
        verification["reason"] = (
            f"its loss is {found['loss']:.6g}, promised was {promised_loss:.6g} "
            f"(at most {allowed:.2g} apart)"
        )
    elif found["weight_bytes"] != report["point"]["weight_bytes"]:
        verification["ok"] = False
        verification["reason"] = (
            f"it holds {found['weight_bytes']} bytes, promised were "
            f"{report['point']['weight_bytes']}"
        )
    return verification


def _allowed(loss: float, same_path: bool) -> float:
    if same_path:
        return SAME_PATH * max(1.0, abs(loss))
    return max(OTHER_PATH_SHARE * abs(loss), OTHER_PATH_NATS)


def _report(folder: Path) -> dict[str, Any]:
    path = folder / "report.json"
    if not path.is_file():
        raise InvalidInput(f"{folder} holds no report.json: not an exported folder")
    try:
        report = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InvalidInput(f"{path} cannot be read: {error}") from error
    if not isinstance(report, dict) or not {"evaluation", "devices", "point"} <= set(report):
        raise InvalidInput(f"{path} was not written by apportion export")
    return report


def _child(job: Mapping[str, Any], threads: int) -> dict[str, Any]:
    environment = os.environ | dict.fromkeys(THREAD_VARIABLES, str(threads))
    with tempfile.TemporaryDirectory(prefix="ap-") as neutral:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "apportion.studies.verification"],
            input=json.dumps({**job, "threads": threads}),
            capture_output=True,
            text=True,
            cwd=neutral,
            env=environment,
            check=False,
        )
    last = done.stdout.strip().rpartition("\n")[2]
    if done.returncode != 0 or not last:
        reason = done.stderr.strip().rpartition("\n")[2]
        raise ApportionError(f"verification ended with exit status {done.returncode}: {reason}")
    answer: dict[str, Any] = json.loads(last)
    if "error" in answer:
        raise InvalidInput(answer["error"])
    return answer


def main() -> None:
    """The child: one job from standard input, one line of JSON to standard output."""
    import torch

    job = json.loads(sys.stdin.read())
    torch.set_num_threads(job["threads"])
    folder = Path(job["folder"])
    report = _report(folder)
    try:
        answer = _loss(folder, report) if job["kind"] == "loss" else _latency(folder, report, job)
    except InvalidInput as error:
        answer = {"error": str(error)}
    print(json.dumps(answer))


def _loss(folder: Path, report: Mapping[str, Any]) -> dict[str, Any]:
    """Held-out loss of the loaded artifact, against the dense model."""
    from safetensors import safe_open

    from apportion.spaces.apply import WRITTEN_BACK
    from apportion.spaces.artifact import TENSORS
    from apportion.spaces.batches import call, no_gradients
    from apportion.spaces.loading import describe
    from apportion.workers.spec import open_setting

    setting = open_setting(report["evaluation"])
    compressed = _loaded(folder, report)
    total = weight = 0.0
    with no_gradients():
        for chunk in setting.open_part("heldout").chunks(report["evaluation"]["batch"]):
            inputs = setting.objective.inputs(chunk.batch)
            reference = (
                call(setting.opened.model, inputs) if setting.objective.needs_reference else None
            )
            sums, weights = setting.objective.measure(
                call(compressed, inputs), chunk.batch, reference
            )
            total, weight = total + float(sums.sum()), weight + float(weights.sum())
    names = [site["implementation"] for site in describe(folder)["sites"]]
    with safe_open(folder / TENSORS, framework="pt") as file:
        size = sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118
    same_path = all(name in ("linear.f32", "conv.f32", WRITTEN_BACK) for name in names)
    return {"loss": total / weight, "weight_bytes": size, "same_path": same_path}


def _loaded(folder: Path, report: Mapping[str, Any]) -> Any:
    """The artifact as a module; a `python:` model's code comes from where the study had it."""
    from apportion.spaces.loading import describe, load
    from apportion.workers.sources import open_model

    source = describe(folder)["model"]
    if source["kind"] == "hf":
        return load(folder)

    def build() -> Any:
        return open_model(source["source"], source["dtype"], folder).model

    return load(folder, model=build)


def _latency(folder: Path, report: Mapping[str, Any], job: Mapping[str, Any]) -> dict[str, Any]:
    """Milliseconds of the device's request, timed beside the dense model."""
    from apportion.cost_models.requests import RequestItem
    from apportion.cost_models.whole_model import compare_models
    from apportion.workers.spec import open_setting

    setting = open_setting(report["evaluation"])
    device = report["devices"][job["device"]]
    measured = compare_models(
        {"artifact": lambda: _loaded(folder, report)},
        setting.opened.model,
        [RequestItem.from_json(item) for item in device["request"]],
        setting.sample,
        threads=job["threads"],
        seconds=LATENCY_SECONDS,
    )["artifact"]
    return {"milliseconds": measured.milliseconds, "ratio": measured.ratio}


if __name__ == "__main__":
    main()
