"""What a report tells of one judged configuration."""

from collections.abc import Callable, Iterable, Mapping
from statistics import fmean
from typing import Any

import numpy as np

from apportion.search.problem import Config
from apportion.spaces.grammar import Option
from apportion.spaces.parts import kept_share
from apportion.spaces.space import Space
from apportion.studies.limits import CACHE_BYTES
from apportion.studies.stages import confirm
from apportion.studies.stages.confirm import Judged


def point_of(judged: Judged, space: Space) -> dict[str, Any]:
    """A point of the front, as `docs/outputs.md` describes it."""
    candidate, loss = judged.candidate, judged.loss
    dropped, width = _structure(space, candidate.config)
    return {
        "number": candidate.number,
        "origin": candidate.origin,
        "loss_search": _known(candidate.loss),
        "loss_heldout": _known(loss.mean),
        "loss_error": _known(loss.error),
        "weight_bytes": round(candidate.costs["weight_bytes"]),
        "resident_bytes": round(candidate.costs["resident_bytes"]),
        "bits": candidate.costs["bits"],
        **_cache_bytes(candidate.costs),
        "latency_ms": judged.latency_ms,
        "sparsity": _mean_share(space, candidate.config, _zeros, of_all=True),
        "rank": _mean_share(space, candidate.config, _kept_by_rank, of_all=False),
        "width": width,
        "dropped": dropped,
        "configuration": space.configuration(candidate.config),
    }


def uniform_of(judged: Judged, won: Judged, space: Space, documents: Any) -> dict[str, Any]:
    """A uniform configuration, with its held-out loss less the winner's."""
    found = confirm.difference(judged.evaluation, won.evaluation, documents)
    return {
        **point_of(judged, space),
        "option": option_of(judged) or "",
        "difference": _known(found.mean),
        "standard_error": _known(found.error),
    }


def by_size(points: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The largest first; of equal sizes the slowest."""

    def order(point: dict[str, Any]) -> tuple[int, float]:
        return -point["weight_bytes"], -sum(t["predicted"] for t in point["latency_ms"].values())

    return sorted(points, key=order)


def option_of(judged: Judged | None) -> str | None:
    """The option that a configuration has everywhere, if it is a uniform one."""
    if judged is None:
        return None
    labels = [label for label in judged.labels if label.startswith("uniform:")]
    return labels[0].removeprefix("uniform:") if labels else None


def _cache_bytes(costs: Mapping[str, float]) -> dict[str, float]:
    """Bytes of a token's keys and values; nothing where the space holds no cache."""
    return {kind: costs[kind] for kind in (CACHE_BYTES,) if kind in costs}


def _structure(space: Space, config: Config) -> tuple[dict[str, int], float]:
    """How many sub-blocks of each kind are dropped, and the mean share that narrower ones keep."""
    dropped: dict[str, int] = {}
    widths: list[float] = []
    for place, (site, choice) in enumerate(zip(space.sites, config, strict=True)):
        option = space.options[place][choice]
        if option.drops:
            dropped[site.kind] = dropped.get(site.kind, 0) + 1
        if option.keep_percent is not None:
            widths.append(kept_share(site, option))
    return dropped, fmean(widths) if widths else 0.0


def _mean_share(
    space: Space, config: Config, share: Callable[[Option], float], of_all: bool
) -> float:
    """A share's mean over the weights that are left, or over those of sites that have one."""
    total = found = 0.0
    for place in space.weight_sites:
        if space.void(config, place):
            continue
        value = share(space.options[place][config[place]])
        weights = space.sites[place].weights
        total += weights if of_all or value else 0
        found += value * weights
    return found / total if total else 0.0


def _known(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _zeros(option: Option) -> float:
    if isinstance(option.sparsity, tuple):
        kept, of = option.sparsity
        return 1 - kept / of
    return float(option.sparsity) / 100 if option.sparsity else 0.0


def _kept_by_rank(option: Option) -> float:
    return float(option.rank_percent) / 100 if option.rank_percent else 0.0
