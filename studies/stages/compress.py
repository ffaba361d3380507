"""Calibrate and compress: the bank of realized options, each made once."""

from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path

from apportion.errors import ApportionError
from apportion.hashing import content_hash, tensors_hash
from apportion.spaces.apply import member_weight
from apportion.spaces.bank import entry_key
from apportion.spaces.degenerate import degeneracy, is_unreached
from apportion.spaces.grammar import Option
from apportion.spaces.outlier_ratios import outlier_ratios
from apportion.spaces.realization import source_hashes
from apportion.spaces.sites import Site
from apportion.spaces.space import DROP_MEAN, Space
from apportion.spaces.statistics import GATES, StatisticsFiles
from apportion.spaces.streaming import Portion, portions
from apportion.studies.calibrating import calibrate
from apportion.studies.context import RANK_MULTIPLE, Context, Output
from apportion.studies.evaluations import Stopped
from apportion.studies.filling import Compressors, fill
from apportion.studies.specification.sections import OWL
from apportion.studies.stages.gates import Gates
from apportion.workers.realizer import Realize

# Raise it when calibration gives other numbers for the same data.
CALIBRATION_VERSION = 3
Index = dict[str, dict[str, str]]


class Statistics:
    """What calibration saw of each site, in one file of the cache for each block."""

    def __init__(self, context: Context, space: Space) -> None:
        self.context = context
        self.portions = portions(space.input_sites, context.setting.blocks, space.mean_sites)
        self.gates = Gates(context, space)

    @property
    def files(self) -> dict[str, Path]:
        """The file of each site's, by the names of its inputs and of its gates."""
        found: dict[str, Path] = {}
        for portion in self.portions:
            names = [name for site in portion.sites for name in site.input_names]
            names += [site.name for site in portion.added]
            found |= dict.fromkeys(names, self.path(portion))
        return found | self.gates.files

    def path(self, portion: Portion) -> Path:
        """The cache file of a block, named by what its statistics are of."""
        opened, data = self.context.opened, self.context.samples("calibration").hash
        names = [site.name for site in portion.sites]
        names += [f"{site.name}:added" for site in portion.added]
        made_from = [opened.revision, self.context.spec.model.dtype, data, names]
        name = content_hash([CALIBRATION_VERSION, *made_from])
        return self.context.home.cache / f"calibration-{name}.safetensors"

    def collect(self, compressors: Compressors) -> None:
        """Collect what the cache does not hold. Raises what `calibrate` does."""
        calibrate(self.context, compressors, self.portions, self.path)
        self.gates.collect()


def run(context: Context, space: Space) -> Output:
    """Realize every option of weights, treatment and constant that the bank does not hold.

    Raises:
        InvalidInput: weights or calibration data that cannot be compressed.
        ApportionError: workers that cannot be kept alive.
        Stopped: the user asked to stop; whole entries stay.
    """
    with closing(Compressors(context)) as compressors:
        return _run(context, space, compressors)


def _run(context: Context, space: Space, compressors: Compressors) -> Output:
    statistics = Statistics(context, space)
    statistics.collect(compressors)
    sites = [place for place in range(len(space.sites)) if _stored_options(space, place)]
    files = statistics.files
    with context.display.stage("compress") as bar:
        index, unseen = _index(context, space, sites, files)
        missing = _missing(context, space, index, files)
        total = sum(len(keys) for keys in index.values())
        left = sum(len(work.keys) for work in missing)
        fill(compressors, missing, lambda made, site: bar.update(total - left + made, total, site))
        size = sum(context.bank.bytes(key) for keys in index.values() for key in keys.values())
        kept = f" ({total - left} there already)" if left < total else ""
        bar.end(f"bank {total} entries, {size / 1e6:.0f} MB{kept}")
    if unseen:
        context.display.warning(
            f"nothing is known of the inputs of {len(unseen)} of {len(sites)} sites, of "
            f"{unseen[0]} for one (apportion sites says why). Their "
            "weights are compressed by themselves (rtn unweighted, magnitude, svd)"
        )
    unreached = _tell_degenerate(context, space, sites, files)
    output = {"index": index, "entries": total, "unreached": unreached}
    if OWL in context.spec.search.start:
        seen = StatisticsFiles(files)
        output["outliers"] = outlier_ratios(context.model, space, context.setting.blocks, seen)
    return output


def _tell_degenerate(
    context: Context, space: Space, places: Sequence[int], files: Mapping[str, Path]
) -> list[str]:
    """Warn once of weights and inputs that leave the methods less to work with.

    Gives the names of what methods needed inputs of and no calibration data entered, an expert.
    """
    statistics, found, unreached = StatisticsFiles(files), dict[str, str](), list[str]()
    for place in places:
        site, options = space.sites[place], _weight_options(space, place)
        if not options:
            continue
        if site.has_experts:
            (name,) = site.input_names
            if is_unreached(statistics.of(name), options):
                found[name] = "no calibration data entered it, so its experts go by their norms"
            continue
        for name, group in zip(site.input_names, site.groups, strict=True):
            weights, seen = [member_weight(context.model, m) for m in group], statistics.of(name)
            if words := degeneracy(weights, seen, options):
                found[name] = words
            if is_unreached(seen, options):
                unreached.append(name)
    if found:
        name = [*unreached, *found][0]
        context.display.warning(
            f"{len(found)} weight site{' is' if len(found) == 1 else 's are'} degenerate, {name} "
            f"for one: {found[name]}. What is done about it: docs/compressors.md, "
            '"Degenerate inputs"'
        )
    return unreached


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
    with closing(Compressors(context)) as compressors:
        statistics.collect(compressors)
        files = statistics.files
        again, _ = _index(context, space, places, files)
        for name, keys in again.items():
            if keys != index[name]:
                raise ApportionError(
                    f"the bank has lost entries of {name}, and this version would make others; "
                    "submit the study under another name"
                )
        fill(compressors, _missing(context, space, again, files), lambda made, site: None)


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
        site, keys = space.sites[place], dict[str, str]()
        options, weight_options = _stored_options(space, place), _weight_options(space, place)
        if weight_options:
            hashes = [statistics.hash(name) for name in site.input_names]
            found = hashes[0] if len(hashes) == 1 else content_hash(hashes)
            for more, alike in _by_what_they_take(site, weight_options, statistics).items():
                keys |= _keys(context, site, alike, content_hash([found, *more]) if more else found)
            if None in hashes:
                unseen.append(site.name)
        means = [option for option in options if option.drops]
        if means:
            keys |= _keys(context, site, means, statistics.added(site.name).hash)
        index[site.name] = keys
    return index, unseen


def _by_what_they_take(
    site: Site, options: Sequence[Option], statistics: StatisticsFiles
) -> dict[tuple[str | None, ...], list[Option]]:
    """Hashes of what options take of the data beside second moments -> those options."""
    found: dict[tuple[str | None, ...], list[Option]] = {}
    for option in options:
        more: list[str | None] = []
        if option.needs_gates:
            more.append(tensors_hash({"gates": statistics.gates(site.name)}))
        if option.static_activations:
            more += [statistics.peak_hash(name) for name in site.input_names]
        found.setdefault(tuple(more), []).append(option)
    return found


def _stored_options(space: Space, place: int) -> list[Option]:
    """The options of a site that the bank holds something of."""
    kept = space.sites[place].is_structure
    options = space.options[place][1:]
    return [o for o in options if o.narrows or not kept or str(o) == DROP_MEAN]


def _weight_options(space: Space, place: int) -> list[Option]:
    """Those of them that have weights of their own."""
    return [option for option in _stored_options(space, place) if not option.drops]


def _keys(
    context: Context, site: Site, options: Sequence[Option], statistics_hash: str | None
) -> dict[str, str]:
    made_from = source_hashes(context.model, site, options)
    dtype = context.spec.model.dtype
    return {
        str(option): entry_key(
            made_from[str(option)],
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

    def file(site: Site) -> str:
        # What a sub-block is given lies in one block, and so in one file, as what it adds does.
        return str(files[next(name for name in (site.name, *site.input_names) if name in files)])

    def gates(name: str) -> str | None:
        return str(files[f"{name}{GATES}"]) if f"{name}{GATES}" in files else None

    works = [
        Realize(name, keys, file(sites[name]), gates(name)) for name, keys in wanted.items() if keys
    ]

    def numbers(work: Realize) -> int:
        groups = sites[work.site].groups
        return sum(m.shape.weights for group in groups for m in group) * len(work.keys)

    return sorted(works, key=numbers, reverse=True)
