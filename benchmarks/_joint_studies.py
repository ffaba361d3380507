"""The studies of joint_space.py: one for each space, seed and target that the space can meet."""

from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor

from _axes import AXES, EVERYTHING, JOINT
from _cells import reading, recorded_tables
from _report import code

from apportion.hashing import content_hash
from apportion.search.solvers.exact import infeasibility
from apportion.studies.context import Context
from apportion.studies.database.store import Store
from apportion.studies.home import Home
from apportion.studies.pricing import Prices
from apportion.studies.specification import StudySpec
from apportion.studies.stages import profile

SPACES = AXES | {"joint": JOINT}
SEEDS = (0, 1, 2)
TARGETS = ((0.22, 1.25), (0.27, 0.85), (0.35, 1.25), (0.5, 0.7))
"""weight_bytes and latency, each over dense."""
TOKENS = 300_000  # for each target, where a space meets them all
WINDOWS = 64  # the full search slice
HELDOUT = 8_192  # tokens
Target = tuple[float, float]
Key = tuple[str, int]
Shares = Callable[[Mapping[str, str]], tuple[float, float]]
"""Tells weight_bytes and latency of any configuration, each over dense."""


def specification(space: str, seed: int, target: Target, tokens: int, place: Home) -> StudySpec:
    """One study of a space."""
    tables = recorded_tables(place.path / "device.json")
    tokens_of = tables["data"]["tokens"] | {"heldout": HELDOUT}
    tables |= {
        "data": tables["data"] | {"tokens": tokens_of},
        "space": EVERYTHING if space == "everything" else SPACES[space],
        "limits": {"weight_bytes": f"{target[0]}x dense", "latency.here": f"{target[1]}x dense"},
        "search": {"solver": "hybrid", "tokens": tokens, "windows": WINDOWS},
    }
    made_by = content_hash([tables, code("search", "studies")])[:8]
    name = f"{space}-{target[0]}-{target[1]}-{seed}-{made_by}"
    return StudySpec(**tables | {"study": {"name": name, "seed": seed}})


def prices_of(context: Context) -> Prices:
    """What the recorded device tells of a space, nothing struck."""
    return profile.prices(context, profile.run(context) | {"struck": {}})


def feasible_targets(spec: StudySpec, place: Home) -> list[Target]:
    """The targets that the space of a study can meet, with what predictions may be wrong by."""
    prices = prices_of(reading(spec, place, Store.open(place.database)))
    found = []
    for target in TARGETS:
        limits = {"weight_bytes": f"{target[0]}x dense", "latency.here": f"{target[1]}x dense"}
        parsed = spec.model_copy(update={"limits": limits}).parsed_limits
        if infeasibility(prices.problem(parsed, {})) is None:
            found.append(target)
    return found


def cells(pool: ProcessPoolExecutor, place: Home) -> dict[Key, list[StudySpec]]:
    """(space, seed) -> its studies, which have the same tokens in all."""
    total = TOKENS * len(TARGETS)
    keys = [(space, seed) for space in SPACES for seed in SEEDS]
    asked = {
        (space, seed): pool.submit(
            feasible_targets, specification(space, seed, TARGETS[0], TOKENS, place), place
        )
        for space, seed in keys
    }
    return {
        (space, seed): [
            specification(space, seed, target, total // len(targets), place) for target in targets
        ]
        for (space, seed), targets in ((key, asked[key].result()) for key in keys)
    }


def priced(context: Context) -> Shares:
    """Prices of a space that holds all options."""
    prices = prices_of(context)
    kinds = ("weight_bytes", "latency.here")
    dense = prices.costs(prices.unit("dense"))

    def shares(configuration: Mapping[str, str]) -> tuple[float, float]:
        costs = prices.costs(prices.space.config(configuration))
        first, second = (costs[kind] / dense[kind] for kind in kinds)
        return first, second

    return shares
