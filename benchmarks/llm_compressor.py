"""Our GPTQ, SparseGPT and Wanda beside llm-compressor's: the same model, data and layer inputs.

The part of `compressors.py` that needs llm-compressor in an environment of its own; what that
environment runs is `llm_compressor_layers.py`.
"""

import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from _report import HOME, ROOT, Claim, at_most, code
from safetensors import safe_open
from safetensors.torch import save_file
from shipped_options import layer_error
from torch import Tensor

from apportion.hashing import content_hash
from apportion.kernels.codes import middle
from apportion.kernels.formats import LayerShape
from apportion.kernels.reference import reference_weight
from apportion.spaces.compressors.compose import InputStatistics, realize
from apportion.spaces.compressors.gptq import gptq_codes
from apportion.spaces.compressors.quantize import Quantized
from apportion.spaces.grammar import Option, parse_option

PYTHON = ROOT / "build" / "llmcompressor" / "bin" / "python"
SCRIPT = ROOT / "benchmarks" / "llm_compressor_layers.py"
INSTALL = (
    f"python -m venv {PYTHON.parent.parent.relative_to(ROOT)}",
    f"{PYTHON.relative_to(ROOT)} -m pip install torch==2.13.0 llmcompressor==0.14.0.1",
)
NATURAL = " natural order"
AGREE = 0.02
COLUMNS = (
    *("recipe", "their error", "ours / theirs", "worst layer", "equal weights"),
    *("ours / theirs, our grid", "worst layer"),
)
Row = dict[str, Any]


def their_layers(model: str, revision: str, tokens: Tensor) -> Path:
    """The folder that `llm_compressor_layers.py` has filled.

    Args:
        model: a Hugging Face folder.
        revision: a hash of what it holds.
        tokens: the calibration windows, int64 [windows, context].
    """
    if not PYTHON.is_file():
        raise SystemExit("\n  ".join(("llm-compressor is not installed; run", *INSTALL)))
    script = code(str(SCRIPT.relative_to(ROOT)))
    place = HOME / f"llm-compressor-{script}-{content_hash([revision, tokens.tolist()])[:8]}"
    place.mkdir(parents=True, exist_ok=True)
    save_file({"tokens": tokens.contiguous()}, place / "tokens")
    command = [str(each) for each in (PYTHON, SCRIPT, model, place / "tokens", place)]
    with (place / "log").open("w") as log:
        done = subprocess.run(command, stdout=log, stderr=log)
    if done.returncode:
        raise SystemExit(f"llm-compressor failed, see {place / 'log'}")
    return place


def rows(
    place: Path, dense: Mapping[str, Tensor], moments: Mapping[str, InputStatistics]
) -> list[Row]:
    """One row for each file of `their_layers`.

    Args:
        place: the folder.
        dense: float32 [out, in] of each layer.
        moments: of each layer's inputs in the dense model.
    """
    return [_row(path, dense, moments) for path in sorted(place.glob("*.safetensors"))]


def _row(path: Path, dense: Mapping[str, Tensor], moments: Mapping[str, InputStatistics]) -> Row:
    with safe_open(path, framework="pt") as file:
        versions = file.metadata()
        theirs = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    recipe = versions.pop("recipe")
    option = parse_option(recipe.removesuffix(NATURAL))
    layers = []
    for name, weight in dense.items():
        grid = theirs.get(f"{name}.scale"), theirs.get(f"{name}.zero")
        layers.append(_compared(weight, option, moments[name], theirs[f"{name}.weight"], *grid))
    told = {
        "kind": "llm-compressor",
        "recipe": recipe,
        "versions": versions,
        "error": _mean(layers, "theirs"),
        "ratio": _mean(layers, "alike") / _mean(layers, "theirs"),
        "worst_ratio": max(_ratios(layers, "alike"), key=lambda ratio: abs(ratio - 1)),
        "equal": _mean(layers, "equal"),
    }
    if option.bits is None:
        return told
    return told | {
        "own_grid_ratio": _mean(layers, "ours") / _mean(layers, "theirs"),
        "own_grid_worst_ratio": max(_ratios(layers, "ours")),
    }


def _compared(
    dense: Tensor,
    option: Option,
    seen: InputStatistics,
    weight: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
) -> Row:
    """Errors of one layer: theirs, ours on their grid if they have one, ours as an option gives it.

    Args:
        dense: float32 [out, in].
        option: what both made of it.
        seen: of its inputs.
        weight: what they made of it, float32 [out, in].
        scale: theirs, float32 [out, groups]; None where they removed weights.
        zero: theirs, whole numbers.
    """
    stored = realize(dense, LayerShape(*dense.shape), option, seen, "float32")
    ours = alike = reference_weight(stored).float()
    if scale is not None and zero is not None:
        alike = on_grid(dense, option.bits or 0, seen, scale, zero)
    made = {"theirs": weight, "alike": alike, "ours": ours}
    errors = {key: layer_error(dense, other, seen) for key, other in made.items()}
    # Corrections in float32 differ in their last digits; codes and masks do so by whole steps.
    equal = torch.isclose(weight, alike, rtol=1e-3, atol=1e-3 * float(dense.std()))
    return errors | {"equal": float(equal.double().mean())}


def on_grid(
    dense: Tensor, bits: float, seen: InputStatistics, scale: Tensor, zero: Tensor
) -> Tensor:
    """What our GPTQ makes of `dense` [out, in] with their scales and zeros, [out, groups] each."""
    grid = Quantized(torch.empty(0), scale, -zero * scale)
    codes = gptq_codes(dense, bits, grid, seen.second_moment).float() - middle(bits)
    group = dense.shape[1] // scale.shape[1]
    scale, zero = (each.repeat_interleave(group, 1) for each in (scale, zero))
    return (codes - zero) * scale


def _mean(layers: Sequence[Row], key: str) -> float:
    return float(sum(layer[key] for layer in layers) / len(layers))


def _ratios(layers: Sequence[Row], key: str) -> list[float]:
    return [layer[key] / layer["theirs"] for layer in layers]


def claims(rows: Sequence[Row]) -> list[Claim]:
    """Every layer's error agrees; with the scales and zeros that we choose it is not larger."""
    made = list[Claim]()
    for row in rows:
        if row["kind"] != "llm-compressor" or row["recipe"].endswith(NATURAL):
            continue
        name, off = f"{row['recipe']}: layer error, ours / llm-compressor's", row["worst_ratio"] - 1
        made.append(at_most(f"{name}, off 1 at most by", abs(off), "x", AGREE))
        if "own_grid_worst_ratio" in row:
            worst = row["own_grid_worst_ratio"]
            made.append(at_most(f"{name}, our grid, largest", worst, "x", 1 + AGREE))
    return made


def cells(row: Row) -> list[str]:
    """A row as text, in the order of COLUMNS."""
    told = [f"`{row['recipe'].removesuffix(NATURAL)}`", f"{row['error']:.3g}"]
    if row["recipe"].endswith(NATURAL):
        told[0] += NATURAL
    told += [f"{row[key]:.4f}" for key in ("ratio", "worst_ratio")]
    told.append(f"{100 * row['equal']:.2f} %")
    if "own_grid_ratio" not in row:
        return [*told, "", ""]
    return told + [f"{row[key]:.3f}" for key in ("own_grid_ratio", "own_grid_worst_ratio")]
