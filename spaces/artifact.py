"""The native artifact: a folder of safetensors and JSON that runs the compressed layers.

`model.safetensors` holds the dense remainder under the model's own names and each packed member
under `MODULE.packed.TENSOR` (what is written back: `MODULE.PARAMETER[.INDEX].packed.TENSOR`) and
what is added in place of a dropped module under `MODULE.constant`;
`apportion.json` says what they are; `report.json` what was promised
and measured. A Hugging Face model's configuration, tokenizer and generation files lie beside them.
`spaces.loading` reads it.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from apportion.errors import InvalidInput
from apportion.spaces.apply import WRITTEN_BACK, chosen_alternatives, constant_of
from apportion.spaces.caches import attention_of
from apportion.spaces.choice import unchosen
from apportion.spaces.grammar import Option
from apportion.spaces.narrowing import narrowed_copy
from apportion.spaces.parts import treated_site
from apportion.spaces.sites import CACHE, Member, Site
from apportion.spaces.space import DENSE, KEEP, Space
from apportion.spaces.stored import Stored, StoredSite

FORMAT_VERSION = 1
DESCRIPTION, TENSORS, REPORT = "apportion.json", "model.safetensors", "report.json"
PACKED, CONSTANT, CACHES = ".packed.", "constant", "caches"


@dataclass(frozen=True)
class Plan:
    """What an artifact is made of: a configuration and how each site of it is stored and run."""

    space: Space
    configuration: Mapping[str, str]
    stored: Stored
    implementations: Mapping[str, Mapping[str, str]]


def remainder(model: nn.Module, plan: Plan, packed: Sequence["Packed"]) -> dict[str, Tensor]:
    """Every tensor that is not packed, of narrowed sub-blocks narrow; tied tensors once."""
    gone = [site.name + "." for site, _ in _dropped(plan)]
    for site in plan.space.sites:
        gone += unchosen(site.name, site.choices, plan.configuration[site.name])
    weights = {m.parameter_path for each in packed for g in each.site.groups for m in g}
    kept: dict[str, Tensor] = {}
    for each in packed:
        if each.stored.kept is not None:
            gone.append(each.site.name + ".")
            narrow = narrowed_copy(model, each.site, each.stored.kept, each.stored.biases)
            named = {f"{each.site.name}.{name}": t for name, t in narrow.state_dict().items()}
            kept |= {n: t.contiguous() for n, t in named.items() if n not in weights}
    seen: set[tuple[int, tuple[int, ...]]] = set()
    for name, tensor in model.state_dict().items():
        place = (tensor.data_ptr(), tuple(tensor.shape))
        dropped = any(name.startswith(prefix) for prefix in gone)
        if dropped or name in weights or (tensor.numel() and place in seen):
            continue
        seen.add(place)
        kept[name] = tensor.contiguous()
    return kept


def _dropped(plan: Plan) -> list[tuple[Site, Option]]:
    """The sites that are dropped, and how."""
    config = plan.space.config(plan.configuration)
    rows = zip(plan.space.sites, plan.space.options, config, strict=True)
    return [(site, row[chosen]) for site, row, chosen in rows if row[chosen].drops]


@dataclass(frozen=True)
class Packed:
    """A site (of a treatment `parts.treated_site`) whose weights are packed, and what runs them."""

    site: Site
    option: str
    stored: StoredSite
    implementation: str

    @property
    def members(self) -> tuple[Member, ...]:
        """The weights that are stored, by where they lie when they are loaded."""
        if self.site.width is not None and self.stored.kept is not None:
            return self.site.width.members(len(self.stored.kept))
        return tuple(member for group in self.site.groups for member in group)

    def to_json(self) -> dict[str, Any]:
        """As the artifact describes it."""
        described = [
            {**replace(member, shape=weight.shape).to_json(), "format": weight.format.to_json()}
            for member, weight in zip(self.members, self.stored.weights, strict=True)
        ]
        entry = {
            "name": self.site.name,
            "option": self.option,
            "implementation": self.implementation,
            "members": described,
        }
        if self.site.width is None or self.stored.kept is None:
            return entry
        return {**entry, "width": self.site.width.to_json(), "kept": list(self.stored.kept)}

    def tensors(self) -> dict[str, Tensor]:
        """Its packed tensors by their names in the artifact."""
        return {
            f"{member.path}{PACKED}{name}": tensor.contiguous()
            for member, weight in zip(self.members, self.stored.weights, strict=True)
            for name, tensor in weight.tensors.items()
        }


def _packed_sites(plan: Plan) -> list[Packed]:
    config = plan.space.config(plan.configuration)
    packed = []
    for place, site in enumerate(plan.space.sites):
        text, option = plan.configuration[site.name], plan.space.options[place][config[place]]
        keeps = site.is_structure and not option.narrows
        if keeps or text == DENSE or plan.space.void(config, place):
            continue
        in_place = site.written_back or site.has_experts
        name = WRITTEN_BACK if in_place else plan.implementations[site.name][text]
        packed.append(Packed(treated_site(site, option), text, plan.stored(site, option), name))
    return packed


def _packed_caches(plan: Plan) -> list[dict[str, Any]]:
    """Which attention keeps its keys and values packed, and how."""
    void = plan.space.voids(plan.space.config(plan.configuration))
    return [
        {
            "name": attention_of(site),
            "option": plan.configuration[site.name],
            CACHE: site.cache.to_json(),
        }
        for site, gone in zip(plan.space.sites, void, strict=True)
        if site.cache is not None and not gone and plan.configuration[site.name] != KEEP
    ]


def contents(model: nn.Module, plan: Plan) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All tensors of the artifact by name, and the description of how they are put together."""
    packed = _packed_sites(plan)
    tensors = remainder(model, plan, packed)
    for each in packed:
        # a norm that took in scales of a site's inputs is the model's own, with other numbers
        tensors |= each.tensors() | each.stored.vectors(each.site)
    dropped = []
    for site, option in _dropped(plan):
        entry: dict[str, Any] = {
            "name": site.name,
            "kind": site.kind,
            "output": site.output,
            "output_length": site.output_length,
            "residual_inside": site.residual_inside,
        }
        constant = constant_of(site, option, plan.stored)
        if constant is not None:
            entry[CONSTANT] = list(constant.shape)
            tensors[f"{site.name}.{CONSTANT}"] = constant.contiguous()
        dropped.append(entry)
    chosen = chosen_alternatives(plan.space, plan.configuration)
    sites = [each.to_json() for each in packed]
    parts = {"sites": sites, "dropped": dropped, "chosen": chosen}
    caches = _packed_caches(plan)
    return tensors, {**parts, CACHES: caches} if caches else parts


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
