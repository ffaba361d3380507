"""Loads an exported folder: numbers and text only, and no part of the search."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from apportion.errors import ApportionError, InvalidInput
from apportion.kernels.formats import DTYPES, Format, StoredWeight
from apportion.kernels.registry import IMPLEMENTATIONS
from apportion.spaces.apply import WRITTEN_BACK, drop, install_groups, install_narrow, write_back
from apportion.spaces.artifact import (
    CACHES,
    CONSTANT,
    DESCRIPTION,
    FORMAT_VERSION,
    PACKED,
    TENSORS,
)
from apportion.spaces.batches import frozen
from apportion.spaces.caches import pack_cache
from apportion.spaces.choice import choice_at
from apportion.spaces.grammar import parse_option
from apportion.spaces.kernel_sizes import make_kernels_plain
from apportion.spaces.layers import tied_names
from apportion.spaces.narrowing import narrowed_copy
from apportion.spaces.padding import served_by
from apportion.spaces.sites import CACHE, Cached, Member, Site, Width


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
    dense = frozen(make_kernels_plain(_skeleton(folder, description, model)))
    try:
        _assemble(dense, description, tensors)
    except (LookupError, AttributeError, TypeError, ValueError, RuntimeError) as error:
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
    for site in description["sites"]:
        if "width" in site:
            narrow = narrowed_copy(model, _treated(site), site["kept"])
            model.set_submodule(site["name"], narrow)
    for entry in description["dropped"]:
        _drop(model, entry, tensors)
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
    missing = sorted(expected - covered)
    if missing:
        raise InvalidInput(f"tensors missing from {TENSORS}: {', '.join(missing[:3])}")
    for entry in description.get(CACHES, []):  # only where some are packed
        cached = Cached.from_json(entry[CACHE])
        pack_cache(model, entry["name"], cached, parse_option(entry["option"]))


def _drop(model: nn.Module, entry: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Leave a module out; the constant in its place is loaded with the model's other tensors."""
    shape, constant = entry.get(CONSTANT), None
    if shape is not None:
        constant = torch.zeros(shape, dtype=tensors[f"{entry['name']}.{CONSTANT}"].dtype)
    told = {key: value for key, value in entry.items() if key != CONSTANT}
    drop(model, Site(members=(), parent=None, **told), constant)


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
    elif served_by(site["implementation"]) not in IMPLEMENTATIONS:
        raise InvalidInput(f"unknown implementation {site['implementation']!r}")
    elif "width" in site:
        width = Width.from_json(site["width"])
        install_narrow(model, width, site["kept"], stored, site["implementation"])
    else:
        install_groups(model, (members,), stored, site["implementation"])
    return {member.parameter_path for member in members}


def _treated(site: Mapping[str, Any]) -> Site:
    return Site(site["name"], "", width=Width.from_json(site["width"]))
