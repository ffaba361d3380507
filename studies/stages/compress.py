"""Calibrate and compress: the bank of realized options, each made once."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from apportion.files import write_whole
from apportion.hashing import content_hash, tensors_hash
from apportion.spaces.apply import member_weight
from apportion.spaces.bank import entry_key
from apportion.spaces.calibration import collect
from apportion.spaces.compressors.compose import InputStatistics, realize
from apportion.spaces.grammar import Option
from apportion.spaces.sites import Site
from apportion.spaces.space import Space
from apportion.studies.context import RANK_MULTIPLE, Context, Output
from apportion.studies.evaluations import Stopped

CALIBRATION_BATCH = 16
# Raise it when calibration gives other numbers for the same data.
CALIBRATION_VERSION = 1


class Statistics:
    """Input statistics of every weight site, kept in the cache and collected again if lost."""

    def __init__(self, context: Context, space: Space) -> None:
        self.context = context
        self.space = space
        self.sites: dict[str, InputStatistics] = {}

    @property
    def path(self) -> Path:
        """The cache file, named by what the statistics are of."""
        opened, data = self.context.opened, self.context.samples("calibration").hash
        names = [site.name for site in self.space.sites if not site.is_structure]
        made_from = [opened.revision, self.context.spec.model.dtype, data, names]
        name = content_hash([CALIBRATION_VERSION, *made_from])
        return self.context.home.cache / f"calibration-{name}.safetensors"

    def load(self) -> None:
        """Read the statistics, or collect them in one pass over the calibration data."""
        if self.path.is_file():
            tensors = load_file(self.path)
            tokens = {n.removesuffix(":n"): int(t) for n, t in tensors.items() if n.endswith(":n")}
            self.sites = {name: InputStatistics(tensors[name], n) for name, n in tokens.items()}
            return
        chunks = self.context.samples("calibration").chunks(CALIBRATION_BATCH)
        with self.context.display.stage("calibrate") as bar:
            self.sites = collect(
                self.context.model,
                self.space,
                (chunk.batch for chunk in chunks),
                lambda done: bar.update(done, len(chunks), ""),
            )
            count = f"{max(s.tokens for s in self.sites.values()):,}" if self.sites else "0"
            bar.end(f"{count} tokens" if self.context.spec.data.is_text else f"{count} rows")
        kept: dict[str, Tensor] = {}
        for name, statistics in self.sites.items():
            kept |= {name: statistics.second_moment, f"{name}:n": torch.tensor(statistics.tokens)}
        write_whole(self.path, save(kept))

    def hash(self, site: str) -> str | None:
        """Content hash of a site's statistics; None where it has none."""
        found = self.sites.get(site)
        if found is None:
            return None
        return tensors_hash({"m": found.second_moment, "n": torch.tensor(found.tokens)})


def run(context: Context, space: Space) -> Output:
    """Realize every option of every weight site that the bank does not hold.

    Raises:
        InvalidInput: weights or calibration data that cannot be compressed.
        Stopped: the user asked to stop; whole entries stay.
    """
    statistics = Statistics(context, space)
    statistics.load()
    sites = [place for place, site in enumerate(space.sites) if not site.is_structure]
    total = sum(len(space.options[place]) - 1 for place in sites)
    index: dict[str, dict[str, str]] = {}
    made = done = 0
    with context.display.stage("compress") as bar:
        for place in sites:
            site = space.sites[place]
            keys = _keys(context, site, space.options[place][1:], statistics)
            for option in space.options[place][1:]:
                if context.stop.is_set():
                    raise Stopped
                made += _fill(context, site, option, keys[str(option)], statistics)
                done += 1
                bar.update(done, total, site.name)
            index[site.name] = keys
        size = sum(context.bank.bytes(key) for keys in index.values() for key in keys.values())
        kept = f" ({total - made} there already)" if made < total else ""
        bar.end(f"bank {total} entries, {size / 1e6:.0f} MB{kept}")
    return {"index": index, "entries": total}


def _keys(
    context: Context, site: Site, options: tuple[Option, ...], statistics: Statistics
) -> dict[str, str]:
    weights = {m.module: member_weight(context.model, m) for m in site.members}
    weights_hash, statistics_hash = tensors_hash(weights), statistics.hash(site.name)
    dtype = context.spec.model.dtype
    return {
        str(option): entry_key(
            weights_hash,
            option,
            statistics_hash if option.needs_statistics else None,
            dtype,
            RANK_MULTIPLE,
        )
        for option in options
    }


def _fill(context: Context, site: Site, option: Option, key: str, statistics: Statistics) -> bool:
    """Whether the entry had to be made."""
    if context.bank.has(key):
        return False
    stored = [
        realize(
            member_weight(context.model, member).float(),
            member.shape,
            option,
            statistics.sites.get(site.name),
            context.spec.model.dtype,
            RANK_MULTIPLE,
        )
        for member in site.members
    ]
    context.bank.put(key, stored)
    return True
