"""The native artifact: a folder of safetensors and JSON that runs the compressed layers.

`model.safetensors` holds the dense remainder under the model's own names and each packed member
under `MODULE.packed.TENSOR` (what is written back: `MODULE.PARAMETER[.INDEX].packed.TENSOR`);
`apportion.json` says what they are; `report.json` what was promised
and measured. A Hugging Face model's configuration, tokenizer and generation files lie beside them.
Loading reads numbers and text only and imports no part of the search.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from apportion.errors import ApportionError, InvalidInput
from apportion.kernels.formats import DTYPES, Format, StoredWeight
from apportion.kernels.registry import IMPLEMENTATIONS
from apportion.spaces.apply import (
    WRITTEN_BACK,
    Stored,
    bias_of,
    chosen_alternatives,
    drop,
    install,
    write_back,
)
from apportion.spaces.batches import frozen
from apportion.spaces.choice import choice_at, unchosen
from apportion.spaces.layers import tied_names
from apportion.spaces.sites import Member, Site
from apportion.spaces.space import DENSE, DROP, Space

FORMAT_VERSION = 1
DESCRIPTION, TENSORS, REPORT = "apportion.json", "model.safetensors", "report.json"
PACKED = ".packed."


@dataclass(frozen=True)
class Plan:
    """What an artifact is made of: a configuration and how each site of it is stored and run."""

    space: Space
    configuration: Mapping[str, str]
    stored: Stored
    implementations: Mapping[str, Mapping[str, str]]


def remainder(model: nn.Module, plan: Plan) -> dict[str, Tensor]:
    """Every tensor of the dense model that the plan leaves as it is; tied tensors once."""
    gone = [s.name + "." for s in plan.space.sites if plan.configuration[s.name] == DROP]
    for site in plan.space.sites:
        gone += unchosen(site.name, site.choices, plan.configuration[site.name])
    packed = {
        member.parameter_path
        for site in plan.space.sites
        if plan.configuration[site.name] != DENSE
        for member in site.members
    }
    kept: dict[str, Tensor] = {}
    seen: set[tuple[int, tuple[int, ...]]] = set()
    for name, tensor in model.state_dict().items():
        place = (tensor.data_ptr(), tuple(tensor.shape))
        dropped = any(name.startswith(prefix) for prefix in gone)
        if dropped or name in packed or (tensor.numel() and place in seen):
            continue
        seen.add(place)
        kept[name] = tensor.contiguous()
    return kept


def _packed_sites(plan: Plan) -> list[tuple[Site, Sequence[StoredWeight], str, str]]:
    config = plan.space.config(plan.configuration)
    packed = []
    for place, site in enumerate(plan.space.sites):
        text = plan.configuration[site.name]
        if site.is_structure or text == DENSE or plan.space.void(config, place):
            continue
        option = plan.space.options[place][config[place]]
        name = WRITTEN_BACK if site.written_back else plan.implementations[site.name][text]
        packed.append((site, plan.stored(site, option), text, name))
    return packed


def contents(model: nn.Module, plan: Plan) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All tensors of the artifact by name, and the description of how they are put together."""
    tensors = remainder(model, plan)
    sites = []
    for site, stored, text, implementation in _packed_sites(plan):
        described = []
        for member, weight in zip(site.members, stored, strict=True):
            described.append({**member.to_json(), "format": weight.format.to_json()})
            for name, tensor in weight.tensors.items():
                tensors[f"{member.path}{PACKED}{name}"] = tensor.contiguous()
        site_entry = {"name": site.name, "option": text, "implementation": implementation}
        sites.append({**site_entry, "members": described})
    dropped = [
        {
            "name": site.name,
            "kind": site.kind,
            "output": site.output,
            "output_length": site.output_length,
            "residual_inside": site.residual_inside,
        }
        for site in plan.space.sites
        if plan.configuration[site.name] == DROP
    ]
    chosen = chosen_alternatives(plan.space, plan.configuration)
    return tensors, {"sites": sites, "dropped": dropped, "chosen": chosen}


def write(
    folder: Path,
    model: nn.Module,
    plan: Plan,
    source: Mapping[str, Any],
    report: Mapping[str, Any],
    save_extra: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Write the artifact; the folder appears whole or not at all.

    Args:
        folder: must not exist yet.
        model: the dense model.
        plan: the configuration and how it is stored.
        source: {"kind": "hf" | "python", "source": ..., "revision": ..., "dtype": ...}.
        report: losses, costs, seeds, fingerprints.
        save_extra: writes configuration, tokenizer and generation files into the folder.

    Raises:
        InvalidInput: the folder exists.
    """
    if folder.exists():
        raise InvalidInput(f"{folder} exists already; choose another folder or remove it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        tensors, parts = contents(model, plan)
        save_extra(temporary)
        save_file(tensors, temporary / TENSORS, metadata={"format": "pt"})
        sites = {site.name: plan.configuration[site.name] for site in plan.space.sites}
        description = {
            "format_version": FORMAT_VERSION,
            "model": dict(source),
            "configuration": sites,
            **parts,
        }
        (temporary / DESCRIPTION).write_text(json.dumps(description, indent=1))
        (temporary / REPORT).write_text(json.dumps(dict(report), indent=1))
        for path in filter(Path.is_file, temporary.rglob("*")):
            path.chmod(0o644)
            with path.open("rb") as file:
                os.fsync(file.fileno())
        temporary.chmod(0o755)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def describe(folder: Path) -> dict[str, Any]:
    """The description of an artifact.

    Raises:
        InvalidInput: the folder holds no artifact, or one of a later version.
    """
    path = folder / DESCRIPTION
    try:
        description = json.loads(path.read_text())
    except FileNotFoundError:
        raise InvalidInput(f"{folder} holds no {DESCRIPTION}: not an exported folder") from None
    except (OSError, ValueError) as error:
        raise InvalidInput(f"{path} cannot be read: {error}") from error
    version = description.get("format_version") if isinstance(description, dict) else None
    if version != FORMAT_VERSION:
        raise InvalidInput(f"{path}: format version {version}; this version reads {FORMAT_VERSION}")
    missing = [key for key in ("model", "sites", "dropped") if key not in description]
    if missing or not {"kind", "source", "dtype"} <= set(description["model"]):
        raise InvalidInput(f"{path} is damaged: it lacks {missing[0] if missing else 'the model'}")
    if description["model"]["dtype"] not in DTYPES:
        raise InvalidInput(f"{path}: dtype is not one of {', '.join(DTYPES)}")
    return dict(description)


def load(folder: str | Path, model: Callable[[], nn.Module] | None = None) -> nn.Module:
    """Load an exported folder as a module that runs the compressed layers.

    Args:
        folder: what `apportion export` wrote.
        model: builds the dense module; needed for `python:` models, whose code is elsewhere.

    Raises:
        InvalidInput: no artifact, a damaged one, or a `python:` model without `model`.
    """
    folder = Path(folder)
    description = describe(folder)
    try:
        tensors = load_file(folder / TENSORS)
    except (OSError, SafetensorError) as error:
        raise InvalidInput(f"{folder / TENSORS} cannot be read: {error}") from error
    dense = frozen(_skeleton(folder, description, model))
    try:
        _assemble(dense, description, tensors)
    except (KeyError, AttributeError, TypeError, ValueError, RuntimeError) as error:
        told = " ".join(str(error).split())
        raise InvalidInput(f"{folder} is damaged or of another model: {told}") from error
    return frozen(dense)


def _skeleton(
    folder: Path, description: Mapping[str, Any], model: Callable[[], nn.Module] | None
) -> nn.Module:
    dtype = DTYPES[description["model"]["dtype"]]
    if model is not None:
        return model().to(dtype)
    if description["model"]["kind"] != "hf":
        raise InvalidInput(
            f"{folder} was made from {description['model']['source']}, whose code is not in the "
            "folder: apportion.load(folder, model=build)"
        )
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ModuleNotFoundError:
        raise InvalidInput('transformers is missing: pip install "apportion[hf]"') from None
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        told = " ".join(str(error).split())
        raise InvalidInput(f"{folder / 'config.json'} cannot be read: {told}") from error
    built = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    if (folder / "generation_config.json").is_file():
        from transformers import GenerationConfig

        built.generation_config = GenerationConfig.from_pretrained(folder)
    if not isinstance(built, nn.Module):
        raise ApportionError(f"{folder}: transformers built no module")
    return built


def _assemble(model: nn.Module, description: Mapping[str, Any], tensors: dict[str, Tensor]) -> None:
    for path, name in description.get("chosen", {}).items():  # older folders name none
        choice_at(model, path).settle(name)
    packed = _packed_by_member(tensors)
    rest = {name: t for name, t in tensors.items() if PACKED not in name}
    expected = set(model.state_dict())
    members = {Member.from_json(m).path for site in description["sites"] for m in site["members"]}
    unknown = sorted(
        name
        for name in tensors
        if name.partition(PACKED)[0] not in (members if PACKED in name else expected)
    )
    if unknown:
        raise InvalidInput(f"tensors the model does not have: {', '.join(unknown[:3])}")
    tied = tied_names(model)
    model.load_state_dict(rest, strict=False, assign=False)
    covered = {alias for name in rest for alias in tied.get(name, {name})}
    for site in description["sites"]:
        covered |= _install_site(model, site, packed)
    for entry in description["dropped"]:
        drop(model, Site(members=(), parent=None, **entry))
        covered |= {name for name in expected if name.startswith(entry["name"] + ".")}
    missing = sorted(expected - covered)
    if missing:
        raise InvalidInput(f"tensors missing from {TENSORS}: {', '.join(missing[:3])}")


def _packed_by_member(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Path of a member -> its packed tensors by name."""
    packed: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        path, found, part = name.partition(PACKED)
        if found:
            packed.setdefault(path, {})[part] = tensor
    return packed


def _install_site(
    model: nn.Module, site: Mapping[str, Any], packed: Mapping[str, dict[str, Tensor]]
) -> set[str]:
    members = [Member.from_json(entry) for entry in site["members"]]
    stored = [
        StoredWeight(Format.from_json(entry["format"]), member.shape, packed.get(member.path, {}))
        for entry, member in zip(site["members"], members, strict=True)
    ]
    if site["implementation"] == WRITTEN_BACK:
        write_back(model, members, stored)
    elif site["implementation"] in IMPLEMENTATIONS:
        modules = [member.module for member in members]
        biases = [bias_of(model, module) for module in modules]
        install(model, modules, stored, biases, site["implementation"])
    else:
        raise InvalidInput(f"unknown implementation {site['implementation']!r}")
    return {member.parameter_path for member in members}
