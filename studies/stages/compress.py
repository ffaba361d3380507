"""Calibrate and compress: the bank of realized options, each made once."""

from collections.abc import Mapping
from pathlib import Path

import torch

from apportion.errors import ApportionError
from apportion.hashing import content_hash, tensors_hash
from apportion.spaces.activations import Activations
from apportion.spaces.apply import member_weight
from apportion.spaces.bank import entry_key
from apportion.spaces.calibration import Sums
from apportion.spaces.compressors.compose import InputStatistics, realize
from apportion.spaces.grammar import Option
from apportion.spaces.sites import Site
from apportion.spaces.space import Space
from apportion.spaces.statistics import read_statistics, write_statistics
from apportion.spaces.streaming import Portion, portions, stream
from apportion.studies.context import RANK_MULTIPLE, Context, Output
from apportion.studies.evaluations import Stopped

CALIBRATION_BATCH = 16
# Raise it when calibration gives other numbers for the same data.
CALIBRATION_VERSION = 1


class Statistics:
    """Input statistics of every weight site, in one file of the cache for each block.

    What is missing is collected; only one site's are in memory after that.
    """

    def __init__(self, context: Context, space: Space) -> None:
        self.context = context
        self.portions = portions(space.sites, context.setting.blocks)
        self._portion = {site.name: p for p in self.portions for site in p.sites}
        self._last: tuple[str, InputStatistics | None] | None = None

    def path(self, portion: Portion) -> Path:
        """The cache file of a block, named by what its statistics are of."""
        opened, data = self.context.opened, self.context.samples("calibration").hash
        names = [site.name for site in portion.sites]
        made_from = [opened.revision, self.context.spec.model.dtype, data, names]
        name = content_hash([CALIBRATION_VERSION, *made_from])
        return self.context.home.cache / f"calibration-{name}.safetensors"

    def collect(self) -> None:
        """Collect what the cache does not hold; a finished block is whole and stays.

        Raises:
            InvalidInput: calibration data that cannot be used.
            Stopped: the user asked to stop.
        """
        missing = [portion for portion in self.portions if not self.path(portion).is_file()]
        if not missing:
            return
        chunks = self.context.samples("calibration").chunks(CALIBRATION_BATCH)
        counts = [0]

        def keep(portion: Portion, sums: Sums) -> None:
            write_statistics(self.path(portion), sums)
            counts.extend(found.tokens for found in sums.values())

        with self.context.display.stage("calibrate") as bar:

            def progress(done: int, total: int) -> None:
                if self.context.stop.is_set():
                    raise Stopped
                bar.update(done, total, "")

            reason = stream(
                self.context.model,
                self.context.setting.blocks,
                missing,
                [chunk.batch for chunk in chunks],
                Activations(self.context.home.cache),
                keep,
                progress,
            )
            unit = "tokens" if self.context.spec.data.is_text else "rows"
            told = f", all blocks at once: {reason}" if reason else ""
            bar.end(f"{max(counts):,} {unit}{told}")

    def of(self, site: str) -> InputStatistics | None:
        """A site's statistics; None where calibration saw nothing enter it."""
        if self._last is None or self._last[0] != site:
            self._last = (site, read_statistics(self.path(self._portion[site]), site))
        return self._last[1]

    def hash(self, site: str) -> str | None:
        """Content hash of a site's statistics; None where it has none."""
        found = self.of(site)
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
    statistics.collect()
    sites = [place for place, site in enumerate(space.sites) if not site.is_structure]
    total = sum(len(space.options[place]) - 1 for place in sites)
    index: dict[str, dict[str, str]] = {}
    unseen: list[str] = []
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
            if statistics.of(site.name) is None:
                unseen.append(site.name)
        size = sum(context.bank.bytes(key) for keys in index.values() for key in keys.values())
        kept = f" ({total - made} there already)" if made < total else ""
        bar.end(f"bank {total} entries, {size / 1e6:.0f} MB{kept}")
    if unseen:
        context.display.warning(
            f"nothing is known of the inputs of {len(unseen)} of {len(sites)} weight sites, of "
            f"{unseen[0]} for one: calibration did not reach them, or they are written back. Their "
            "weights are compressed by themselves (rtn unweighted, magnitude, svd)"
        )
    return {"index": index, "entries": total}


def restore(context: Context, space: Space, index: Mapping[str, Mapping[str, str]]) -> None:
    """Make again what the bank has lost since the stage ended: cleared by hand, or a new disk.

    Raises:
        ApportionError: this version would make something else.
        InvalidInput, Stopped: like `run`.
    """
    places = [space.names[name] for name, keys in index.items() if not _all_there(context, keys)]
    if not places:
        return
    context.display.warning(
        f"bank entries of {len(places)} site{'' if len(places) == 1 else 's'} are gone from "
        f"{context.home.bank}; they are made again"
    )
    statistics = Statistics(context, space)
    statistics.collect()
    for place in places:
        site, options = space.sites[place], space.options[place][1:]
        keys = _keys(context, site, options, statistics)
        if keys != index[site.name]:
            raise ApportionError(
                f"the bank has lost entries of {site.name}, and this version would make others; "
                "submit the study under another name"
            )
        for option in options:
            if context.stop.is_set():
                raise Stopped
            _fill(context, site, option, keys[str(option)], statistics)


def _all_there(context: Context, keys: Mapping[str, str]) -> bool:
    return all(context.bank.has(key) for key in keys.values())


def _keys(
    context: Context, site: Site, options: tuple[Option, ...], statistics: Statistics
) -> dict[str, str]:
    weights = {m.path: member_weight(context.model, m) for m in site.members}
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
            statistics.of(site.name),
            context.spec.model.dtype,
            RANK_MULTIPLE,
        )
        for member in site.members
    ]
    context.bank.put(key, stored)
    return True
