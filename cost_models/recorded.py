"""Recorded devices: measurements taken elsewhere, in a file, with their device's fingerprint."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apportion.cost_models.fingerprint import fingerprint_hash
from apportion.cost_models.session import Stored
from apportion.errors import InvalidInput

FORMAT_VERSION = 1
PARTS = ("format_version", "fingerprint", "measurements")


@dataclass(frozen=True)
class RecordedDevice:
    """What `measure_profile` takes as `fingerprint` and `known`, with `timing=None`."""

    fingerprint: dict[str, Any]
    measurements: dict[str, Stored]


def write_recorded(
    path: Path, fingerprint: Mapping[str, Any], measurements: Mapping[str, Stored]
) -> None:
    """Write a store's measurements of one device as a recorded device."""
    value = {
        "format_version": FORMAT_VERSION,
        "fingerprint": dict(fingerprint),
        "measurements": {key: measurements[key] for key in sorted(measurements)},
    }
    path.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n")


def read_recorded(path: Path, expected: str | None = None) -> RecordedDevice:
    """Read a recorded device.

    Args:
        path: the file.
        expected: hash of the fingerprint that it must have; None: any.

    Raises:
        InvalidInput: no such file, not of this form, or of another device.
    """
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise InvalidInput(f"recorded device: no file {path}") from None
    except (OSError, ValueError) as error:
        raise InvalidInput(f"recorded device: {path} cannot be read: {error}") from None
    if not isinstance(value, dict) or sorted(value) != sorted(PARTS):
        raise InvalidInput(f"recorded device: {path} does not hold {', '.join(PARTS)}")
    if value["format_version"] != FORMAT_VERSION:
        raise InvalidInput(
            f"recorded device: {path} has format version {value['format_version']}; "
            f"this version reads {FORMAT_VERSION}"
        )
    device = RecordedDevice(value["fingerprint"], value["measurements"])
    refuse_other(device.fingerprint, expected, str(path))
    return device


def refuse_other(fingerprint: Mapping[str, Any], expected: str | None, where: str) -> None:
    """Raise InvalidInput where measurements are of another device than the expected hash names."""
    found = fingerprint_hash(fingerprint)
    if expected is not None and found != expected:
        cpu, threads = fingerprint.get("cpu"), fingerprint.get("threads")
        raise InvalidInput(
            f"{where}: measured on another device ({cpu}, {threads} threads, {found[:8]}), not on "
            f"{expected[:8]}; measure again, or name the device that it was"
        )
