"""The sites of a model, for `apportion sites`."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from apportion.cost_models.cache_bytes import has_caches
from apportion.errors import InvalidInput
from apportion.spaces.caches import find_caches
from apportion.spaces.discovery import Discovery, discover
from apportion.spaces.sites import Site
from apportion.spaces.space import Space
from apportion.studies.cli.records import SiteRow
from apportion.studies.context import worker_spec
from apportion.studies.home import Home
from apportion.studies.specification import StudySpec
from apportion.workers.sources import open_model
from apportion.workers.spec import Setting, open_setting

PROBE_TOKENS = 8


def site_rows(source: str | StudySpec) -> list[SiteRow]:
    """Every site in tree order, then the layers that are none with the reason.

    Args:
        source: a model, or a study's specification (its options are listed too).

    Raises:
        InvalidInput: no model there, or a `python:` model without data to run it on.
    """
    if isinstance(source, StudySpec):
        setting = open_setting(worker_spec(source, Home.find()))
        found = discover(setting.opened.model, setting.sample)
        return _rows(replace(found, sites=setting.sites), setting.space, _without_caches(setting))
    opened = open_model(source, "float32", Path.cwd())
    if not opened.is_causal_lm:
        raise InvalidInput(
            f"{source}: its sites are found by running it, which needs data: give a study file "
            f'("apportion init {source}" writes one)'
        )
    ids = torch.ones((1, PROBE_TOKENS), dtype=torch.int64)
    return _rows(discover(opened.model, {"input_ids": ids}), None, {})


def _without_caches(setting: Setting) -> Mapping[str, str]:
    """Attention sub-blocks whose cache cannot be packed -> why; empty where no cache is a site."""
    if not has_caches(setting.space):
        return {}
    return find_caches(setting.opened.model, setting.sample, setting.sites).refused


def _rows(
    found: Discovery, space: Space | None, without_caches: Mapping[str, str]
) -> list[SiteRow]:
    rows = [
        SiteRow(
            name=site.name,
            kind=site.kind,
            parent=site.parent,
            layers=len(site.members),
            weights=site.weights,
            options=_options(site, space),
            note=_note(site, space, found, without_caches.get(site.name)),
        )
        for site in found.sites
    ]
    return rows + [
        SiteRow(
            name=name, kind="-", parent=None, layers=1, weights=0, options=[], note=f"fixed: {why}"
        )
        for name, why in found.untreated.items()
    ]


def _options(site: Site, space: Space | None) -> list[str]:
    if space is None or site.name not in space.names:
        return []
    return list(space.texts[space.names[site.name]])


def _note(site: Site, space: Space | None, found: Discovery, no_cache: str | None) -> str:
    told = _own_note(site, space, found)
    return "; ".join(part for part in (told, no_cache and f"no kNvM: {no_cache}") if part)


def _own_note(site: Site, space: Space | None, found: Discovery) -> str:
    if space is not None and site.name not in space.names:
        return "fixed: no entry of the space names it"
    if site.choices:
        return f"a choice block: runs one of {', '.join(site.choices)}"
    if site.cache is not None:
        cached = site.cache
        return (
            f"of each token {cached.heads} heads: {cached.key_channels} channels of keys, "
            f"{cached.value_channels} of values"
        )
    if notes := _width_notes(site, found):
        return "; ".join(notes)
    if site.optional:
        return "only a site where a pattern names it"
    if site.written_back:
        told = "written back: runs as dense does, no latency credit"
        return f"{told}, no input statistics: {site.unseen}" if site.unseen else told
    if site.name in found.unreached:
        return "not reached when it was tried: no input statistics unless calibration reaches it"
    if site.norm is not None:
        return f"scales of awq go into {site.norm.module}, which it alone reads"
    is_grouped = any(m.shape.conv is not None and m.shape.conv.groups > 1 for m in site.members)
    return "no input statistics: a grouped convolution" if is_grouped else ""


def _width_notes(site: Site, found: Discovery) -> list[str]:
    """What of a sub-block can be left out, or why nothing; empty of a weight site."""
    notes = []
    if (width := site.width) is not None:
        notes.append(f"cP% keeps some of its {width.units} {width.unit}s")
        if width.experts is not None:
            notes[0] += f", at least {width.experts.least}; no latency credit"
    elif site.name in found.fixed_widths:
        notes.append(f"no cP%: {found.fixed_widths[site.name]}")
    if site.values is not None:
        notes.append(f"vP% keeps some of the {site.values.units} value dimensions of each head")
    elif site.name in found.fixed_values:
        notes.append(f"no vP%: {found.fixed_values[site.name]}")
    if (width := site.query_keys) is not None:
        pairs = " as rotary pairs" if width.pairs else ""
        size = width.units // width.heads
        notes.append(f"qP% keeps some of the {size} query-key dimensions of each head{pairs}")
    elif site.name in found.fixed_query_keys:
        notes.append(f"no qP%: {found.fixed_query_keys[site.name]}")
    return notes
