"""Calibrate and compress: the bank of realized options, each made once."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from apportion.errors import ApportionError
from apportion.hashing import content_hash, tensors_hash
from apportion.spaces.activations import Activations
from apportion.spaces.apply import member_weight
from apportion.spaces.bank import entry_key
from apportion.spaces.calibration import Sums
from apportion.spaces.degenerate import degeneracy
from apportion.spaces.grammar import Option
from apportion.spaces.sites import Site
from apportion.spaces.space import Space
from apportion.spaces.statistics import StatisticsFiles, write_statistics
from apportion.spaces.streaming import Portion, portions, stream
from apportion.studies.context import RANK_MULTIPLE, Context, Output
from apportion.studies.evaluations import Stopped
from apportion.studies.filling import fill
from apportion.workers.realizer import Realize

CALIBRATION_BATCH = 16
# Raise it when calibration gives other numbers for the same data.
CALIBRATION_VERSION = 1
Index = dict[str, dict[str, str]]


class Statistics:
    """Input statistics of every weight site, in one file of the cache for each block."""

    def __init__(self, context: Context, space: Space) -> None:
        self.context = context
        self.portions = portions(space.input_sites, context.setting.blocks)

    @property
    def files(self) -> dict[str, Path]:
        """The file of each site's."""
        return {site.name: self.path(p) for p in self.portions for site in p.sites}

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


def run(context: Context, space: Space) -> Output:
    """Realize every option of weights and every treatment that the bank does not hold.

    Raises:
        InvalidInput: weights or calibration data that cannot be compressed.
        ApportionError: workers that cannot be kept alive.
        Stopped: the user asked to stop; whole entries stay.
    """
    statistics = Statistics(context, space)
    statistics.collect()
    sites = [place for place in range(len(space.sites)) if _stored_options(space, place)]
    files = statistics.files
    with context.display.stage("compress") as bar:
        index, unseen = _index(context, space, sites, files)
        missing = _missing(context, space, index, files)
        total = sum(len(keys) for keys in index.values())
        left = sum(len(work.keys) for work in missing)
        fill(context, missing, lambda made, site: bar.update(total - left + made, total, site))
        size = sum(context.bank.bytes(key) for keys in index.values() for key in keys.values())
        kept = f" ({total - left} there already)" if left < total else ""
        bar.end(f"bank {total} entries, {size / 1e6:.0f} MB{kept}")
    if unseen:
        context.display.warning(
            f"nothing is known of the inputs of {len(unseen)} of {len(sites)} sites, of "
            f"{unseen[0]} for one: calibration did not reach them, or they are written back. Their "
            "weights are compressed by themselves (rtn unweighted, magnitude, svd)"
        )
    _tell_degenerate(context, space, sites, files)
    return {"index": index, "entries": total}


def _tell_degenerate(
    context: Context, space: Space, places: Sequence[int], files: Mapping[str, Path]
) -> None:
    """Warn once of weights and inputs that leave the methods less to work with."""
    statistics, found = StatisticsFiles(files), dict[str, str]()
    for place in places:
        site, options = space.sites[place], _stored_options(space, place)
        for name, group in zip(site.input_names, site.groups, strict=True):
            weights = [member_weight(context.model, member) for member in group]
            if words := degeneracy(weights, statistics.of(name), options):
                found[name] = words
    if found:
        name, words = next(iter(found.items()))
        context.display.warning(
            f"{len(found)} weight site{' is' if len(found) == 1 else 's are'} degenerate, {name} "
            f'for one: {words}. What is done about it: docs/compressors.md, "Degenerate inputs"'
        )


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
    files = statistics.files
    again, _ = _index(context, space, places, files)
    for name, keys in again.items():
        if keys != index[name]:
            raise ApportionError(
                f"the bank has lost entries of {name}, and this version would make others; "
                "submit the study under another name"
            )
    fill(context, _missing(context, space, again, files), lambda made, site: None)


def _all_there(context: Context, keys: Mapping[str, str]) -> bool:
    return all(context.bank.has(key) for key in keys.values())


def _index(
    context: Context, space: Space, places: Sequence[int], files: Mapping[str, Path]
) -> tuple[Index, list[str]]:
    """Site -> option -> key of its entry, and the sites of whose inputs nothing is known."""
    statistics, index, unseen = StatisticsFiles(files), Index(), []
    for place in places:
        if context.stop.is_set():
            raise Stopped
        site = space.sites[place]
        hashes = [statistics.hash(name) for name in site.input_names]
        found = hashes[0] if len(hashes) == 1 else content_hash(hashes)
        index[site.name] = _keys(context, site, _stored_options(space, place), found)
        if None in hashes:
            unseen.append(site.name)
    return index, unseen


def _stored_options(space: Space, place: int) -> list[Option]:
    """The options of a site that have weights of their own."""
    kept = space.sites[place].is_structure
    return [o for o in space.options[place][1:] if o.narrows or not kept]


def _keys(
    context: Context, site: Site, options: Sequence[Option], statistics_hash: str | None
) -> dict[str, str]:
    members = [member for group in site.groups for member in group]
    weights_hash = tensors_hash({m.path: member_weight(context.model, m) for m in members})
    if site.width is not None:
        weights_hash = content_hash([weights_hash, site.width.to_json()])
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


def _missing(
    context: Context, space: Space, index: Index, files: Mapping[str, Path]
) -> list[Realize]:
    """What the bank lacks, site by site; the most work first, so that all workers end together."""
    wanted = {
        name: {text: key for text, key in keys.items() if not context.bank.has(key)}
        for name, keys in index.items()
    }
    sites = {site.name: site for site in space.sites}
    # What a sub-block is given lies in one block, and so in one file.
    works = [
        Realize(name, keys, str(files[sites[name].input_names[0]]))
        for name, keys in wanted.items()
        if keys
    ]

    def numbers(work: Realize) -> int:
        groups = sites[work.site].groups
        return sum(m.shape.weights for group in groups for m in group) * len(work.keys)

    return sorted(works, key=numbers, reverse=True)
