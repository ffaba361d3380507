"""What a study file may leave out. Works on the raw tables, whatever they hold."""

import os
from collections.abc import Mapping
from typing import Any

import psutil  # type: ignore[import-untyped]

from apportion.studies.specification.references import TEXT

CONTEXT = 512
TOKENS = {"calibration": 131_072, "search": 65_536, "heldout": 131_072}
WINDOWS = 64
FIRST_STAGE = 8
EVALUATIONS = 128
"""The budget: so many times the full search slice."""
DEVICE = "here"
WEIGHT_OPTIONS = ("dense", "bf16", "w8", "w8a8", "w4g64:gptq", "w3g64:gptq",
                  "s50%:sparsegpt+w4g64:gptq", "r50%")  # fmt: skip
SPACE = (
    {"sites": ["*"], "options": list(WEIGHT_OPTIONS), "unfit": "skip"},
    {"sites": ["*"], "options": ["keep", "drop"], "unfit": "skip"},
)

Table = dict[str, Any]


def physical_cores() -> int:
    """Physical cores that this process may use."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(psutil.cpu_count(logical=False) or 1, usable or 1)


def with_defaults(tables: Mapping[str, Any]) -> Table:
    """The tables of a study file with all that they leave out. Wrong values are left alone."""
    filled = dict(tables)
    if isinstance(study := filled.setdefault("study", {}), dict):
        filled["study"] = {"name": "study"} | study
    data = filled["data"] = _data(filled.get("data"))
    if data is None:
        del filled["data"]
    filled.setdefault("objective", {})
    filled.setdefault("space", SPACE)
    filled["limits"] = flat_limits(filled.get("limits", {}))
    if isinstance(devices := filled.get("devices") or {DEVICE: {}}, dict):
        devices = {name: _device(device, data) for name, device in devices.items()}
    filled["devices"] = devices
    filled["search"] = _search(filled.get("search", {}), data)
    return filled


def flat_limits(limits: Any) -> Any:
    """{"latency": {"here": "9 ms"}} -> {"latency.here": "9 ms"}."""
    if not isinstance(limits, dict):
        return limits
    flat: Table = {}
    for kind, text in limits.items():
        if isinstance(text, dict):
            flat |= {f"{kind}.{name}": inner for name, inner in text.items()}
        else:
            flat[kind] = text
    return flat


def is_text(data: Any) -> bool:
    """Whether raw data are documents."""
    if not isinstance(data, dict):
        return False
    source = data.get("source", data.get("calibration"))
    return isinstance(source, str) and source.startswith(TEXT)


def _data(data: Any) -> Any:
    if not is_text(data):
        return data
    filled = {"context": CONTEXT} | data
    tokens = filled.get("tokens", {})
    filled["tokens"] = TOKENS | tokens if isinstance(tokens, dict) else tokens
    return filled


def _device(device: Any, data: Any) -> Any:
    if not isinstance(device, dict) or device.get("kind", "cpu") != "cpu":
        return device
    prefill = {"phase": "prefill", "batch": 1, "tokens": window_tokens(data)}
    request = prefill if is_text(data) else {"phase": "forward", "batch": 1}
    return {"kind": "cpu", "threads": physical_cores(), "request": [request]} | device


def _search(search: Any, data: Any) -> Any:
    if not isinstance(search, dict):
        return search
    filled = {"windows": max(1, min(WINDOWS, available_windows(data) or WINDOWS))} | search
    windows = filled["windows"]
    if type(windows) is not int:
        windows = WINDOWS
    stages = [min(FIRST_STAGE, windows), windows]
    if isinstance(survivors := filled.get("survivors"), list) and len(survivors) == 1:
        stages = stages[1:]
    budget = EVALUATIONS * windows * window_tokens(data)
    return {"tokens": budget, "stages": stages} | filled


def window_tokens(data: Any) -> int:
    """What one window costs of the budget: its tokens, or 1 for a sample that is not text."""
    context = data.get("context") if is_text(data) else 1
    return context if type(context) is int and context > 0 else 1


def available_windows(data: Any) -> int | None:
    """How many windows the search part can hold at most; None where the file does not say."""
    sizes = data.get("tokens" if is_text(data) else "samples") if isinstance(data, dict) else None
    search = sizes.get("search") if isinstance(sizes, dict) else None
    return search // window_tokens(data) if type(search) is int else None
