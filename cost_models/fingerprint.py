"""Which machine this is, and whether it is fit to be timed now."""

import os
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from apportion.hashing import content_hash

INSTRUCTION_SETS = (
    *("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_bf16", "amx_int8"),
    *("asimd", "asimddp", "bf16", "i8mm", "sve"),
)
CPU_NAMES = ("model name", "Hardware", "CPU implementer")
BUSY_LOAD_PER_CORE = 0.5
SLOW_GOVERNORS = ("powersave", "conservative")
CPUINFO = Path("/proc/cpuinfo")
POWER = Path("/sys/class/power_supply")
GOVERNOR = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
UNKNOWN_CACHE_BYTES = 32 * 2**20


def fingerprint(threads: int) -> dict[str, Any]:
    """What decides how fast this machine is; tables of another fingerprint are refused.

    Args:
        threads: intra-op threads of torch.
    """
    info = _cpu_info()
    flags = set(info.get("flags", info.get("Features", "")).split())
    return {
        "kind": "cpu",
        "cpu": next((info[key] for key in CPU_NAMES if key in info), platform.processor()),
        "instruction_sets": [name for name in INSTRUCTION_SETS if name in flags],
        "cores": _cores(),
        "cache_bytes": last_level_cache_bytes(),
        "threads": threads,
        "torch": version("torch"),
        "os": f"{platform.system()} {platform.machine()}",
    }


def fingerprint_hash(value: Mapping[str, Any]) -> str:
    """32 hexadecimal digits."""
    return content_hash(dict(value))


def conditions() -> dict[str, Any]:
    """Load averages, power source ("mains", "battery" or None) and frequency governor, now."""
    load = os.getloadavg() if hasattr(os, "getloadavg") else (0.0, 0.0, 0.0)
    governor = _text(GOVERNOR)
    return {"load": list(load), "cores": _cores(), "power": _power_source(), "governor": governor}


def doubt(value: Mapping[str, Any]) -> str | None:
    """One line on why latencies taken under these conditions are doubtful; None if they are not."""
    reasons = []
    if value["load"][0] > BUSY_LOAD_PER_CORE * value["cores"]:
        reasons.append(f"load {value['load'][0]:.1f} on {value['cores']} cores")
    if value["power"] == "battery":
        reasons.append("on battery")
    if value["governor"] in SLOW_GOVERNORS:
        reasons.append(f"frequency governor {value['governor']}")
    return f"latencies are doubtful: {', '.join(reasons)}" if reasons else None


def last_level_cache_bytes() -> int:
    """Size of the largest cache of the first core; 32 MiB where the system does not tell."""
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    sizes = [_text(path / "size") for path in CACHES.glob("index*")]
    found = [int(s[:-1]) * units[s[-1]] for s in sizes if s and s[-1] in units]
    return max(found, default=UNKNOWN_CACHE_BYTES)


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu_info() -> dict[str, str]:
    """The first processor's entries of /proc/cpuinfo; empty where there is none."""
    text = _text(CPUINFO) or ""
    lines = text.split("\n\n")[0].splitlines()
    pairs = (line.partition(":") for line in lines)
    return {key.strip(): value.strip() for key, _, value in pairs}


def _power_source() -> str | None:
    supplies = list(POWER.glob("*")) if POWER.is_dir() else []
    mains = [_text(supply / "online") for supply in supplies if _text(supply / "type") == "Mains"]
    if mains:
        return "mains" if "1" in mains else "battery"
    states = [_text(supply / "status") for supply in supplies]
    return "battery" if "Discharging" in states else None


def _text(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None
