"""What every benchmark ends with: its claims, two tables, and results/NAME.json."""

import json
import math
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from apportion.cost_models.fingerprint import conditions, doubt, fingerprint
from apportion.hashing import content_hash, file_hash
from apportion.studies.cli.display import ConsoleDisplay

HERE = Path(__file__).absolute().parent
ROOT = HERE.parent
RESULTS = HERE / "results"
HOME = HERE / "home"
"""What a benchmark has done so far; remove it to begin afresh."""
PACKAGES = ("apportion", "torch", "transformers", "numpy", "scipy", "highspy")


@dataclass(frozen=True)
class Claim:
    """A figure that a benchmark is there to show, and whether it keeps its bound."""

    name: str
    value: float
    unit: str
    bound: str
    holds: bool


def at_most(name: str, value: float, unit: str, bound: float) -> Claim:
    """Holds where `value` <= `bound`; never for nan."""
    return Claim(name, value, unit, f"<= {bound:.4g}", value <= bound)


def at_least(name: str, value: float, unit: str, bound: float) -> Claim:
    """Holds where `value` >= `bound`; never for nan."""
    return Claim(name, value, unit, f">= {bound:.4g}", value >= bound)


def code(*folders: str) -> str:
    """8 hexadecimal digits of the source in some folders, or files, of the repository."""
    places = [ROOT / folder for folder in folders]
    found = [place.rglob("*.py") if place.is_dir() else [place] for place in places]
    files = sorted(path for paths in found for path in paths)
    return content_hash([[str(p.relative_to(ROOT)), file_hash(p)] for p in files])[:8]


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str] = ()) -> None:
    """Print a table."""
    ConsoleDisplay(sys.stdout).table(columns, rows, notes)


def write(
    name: str, threads: int, rows: Sequence[Mapping[str, Any]], claims: Sequence[Claim]
) -> None:
    """Print the claims and write results/NAME.json.

    Args:
        name: of the benchmark.
        threads: that the machine was used with.
        rows: what was found, as plain JSON.
        claims: what it is there to show.
    """
    now = conditions()
    report = {
        "machine": fingerprint(threads) | {"conditions": now},
        "versions": {"python": platform.python_version()} | {p: version(p) for p in PACKAGES},
        "rows": [_plain(row) for row in rows],
        "claims": [_plain(asdict(claim)) for claim in claims],
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
    print()
    told = [[c.name, f"{c.value:.4g}", c.unit, c.bound, _word(c)] for c in claims]
    doubtful = doubt(now)
    table(("claim", "value", "unit", "bound", ""), told, [doubtful] if doubtful else [])
    kept = sum(claim.holds for claim in claims)
    print(f"\n {kept} of {len(claims)} claims hold · benchmarks/results/{path.name}")


def _word(claim: Claim) -> str:
    return "holds" if claim.holds else "does not hold"


def _plain(value: Any) -> Any:
    """The value without nan and infinity, which JSON does not know."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
