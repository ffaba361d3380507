"""Times callables against a reference beside them, on a machine that is never quite quiet.

Candidates are called in random order in short blocks, the reference once in every block. What is
told is the median of the paired log ratios: frequency changes, neighbours and cold caches meet both
sides of a pair alike, so the ratio holds where milliseconds do not.
"""

import gc
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

Call = Callable[[], object]
Clock = Callable[[], float]
"""Seconds of a clock that never goes back."""

BLOCK = 6
"""Candidates in a block: few enough that the reference is near each of them in time."""
LEAST_PAIRS = 7
PAIRS_BETWEEN_LOOKS = 4
SHORTEST_SECONDS = 50e-6
"""Shorter calls are timed several at once: the clock itself costs some 0.1 us."""
WARM_UP_CALLS = (3, 12)
SETTLED = 0.05
RESAMPLES = 400


@dataclass(frozen=True)
class Measurement:
    """What one candidate takes.

    Attributes:
        ratio: median of the paired ratios to the reference.
        low, high: 95 % bootstrap interval of that median.
        milliseconds: ratio x the reference's median over the whole comparison.
        pairs: how many pairs were timed.
        stopped_by: "width" where the interval became narrow enough, else "time".
    """

    ratio: float
    low: float
    high: float
    milliseconds: float
    pairs: int
    stopped_by: Literal["width", "time"]

    @property
    def reference_milliseconds(self) -> float:
        """The reference's median."""
        return self.milliseconds / self.ratio

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        return cls(**value)


@dataclass
class _Track:
    """One candidate's pairs so far; `spent` holds its own seconds and its share of the others'."""

    call: Call
    repeats: int
    log_ratios: list[float] = field(default_factory=list)
    spent: float = 0.0
    narrow: bool = False


def compare(
    candidates: Mapping[str, Call],
    reference: Call,
    *,
    seconds: float,
    half_width: float,
    seed: int,
    clock: Clock = time.perf_counter,
) -> dict[str, Measurement]:
    """Time every candidate in pairs with the reference.

    Args:
        candidates: name -> what is timed.
        reference: what all are compared with.
        seconds: measuring time for each candidate, its share of the reference included.
        half_width: a candidate is done once its ratio is known to +- this share (0.01: 1 %).
        seed: of the random order.
        clock: tells seconds; tests hand in a false one.
    """
    generator = np.random.default_rng(seed)
    collecting = gc.isenabled()
    gc.disable()
    try:
        first = _Track(reference, _warm_up(reference, clock))
        tracks = {n: _Track(call, _warm_up(call, clock)) for n, call in candidates.items()}
        references = _collect(list(tracks.values()), first, seconds, half_width, generator, clock)
    finally:
        if collecting:
            gc.enable()
    typical = 1e3 * float(np.median(references)) if references else math.nan
    return {name: _measurement(track, typical, generator) for name, track in tracks.items()}


def _warm_up(call: Call, clock: Clock) -> int:
    """Call until two calls in a row take alike; returns how many are long enough to be timed."""
    least, most = WARM_UP_CALLS
    before = best = math.inf
    for count in range(1, most + 1):
        now = _timed(call, 1, clock)
        best = min(best, now)
        if count >= least and now >= before * (1 - SETTLED):
            break
        before = now
    return max(1, math.ceil(SHORTEST_SECONDS / best)) if best > 0 else 1


def _timed(call: Call, repeats: int, clock: Clock) -> float:
    """Seconds of one call, the mean of `repeats`."""
    start = clock()
    for _ in range(repeats):
        call()
    return (clock() - start) / repeats


def _collect(
    tracks: list[_Track],
    reference: _Track,
    seconds: float,
    half_width: float,
    generator: np.random.Generator,
    clock: Clock,
) -> list[float]:
    """Fill the tracks; returns the reference's seconds."""
    references: list[float] = []
    while active := [t for t in tracks if not _done(t, seconds)]:
        order = generator.permutation(len(active))
        blocks = math.ceil(len(active) / BLOCK)
        for part in np.array_split(order, blocks):
            references.append(_block([active[i] for i in part], reference, generator, clock))
        for track in active:
            track.narrow = _is_narrow(track.log_ratios, half_width)
    return references


def _block(
    tracks: list[_Track], reference: _Track, generator: np.random.Generator, clock: Clock
) -> float:
    """One call of each, in random order; returns the reference's seconds."""
    everything = [reference, *tracks]
    taken = [0.0] * len(everything)
    for place in generator.permutation(len(everything)):
        taken[place] = _timed(everything[place].call, everything[place].repeats, clock)
    share = taken[0] * reference.repeats / len(tracks)
    for track, own in zip(tracks, taken[1:], strict=True):
        track.log_ratios.append(math.log(own / taken[0]))
        track.spent += own * track.repeats + share
    return taken[0]


def _done(track: _Track, seconds: float) -> bool:
    if len(track.log_ratios) < LEAST_PAIRS:
        return False
    return track.narrow or track.spent >= seconds


def _is_narrow(log_ratios: list[float], half_width: float) -> bool:
    """The binomial interval of the median (no resampling, so it can be looked at often)."""
    pairs = len(log_ratios)
    if pairs < 2 * LEAST_PAIRS or pairs % PAIRS_BETWEEN_LOOKS:
        return False
    ordered = np.sort(log_ratios)
    reach = 0.98 * math.sqrt(pairs)  # 1.96 standard deviations of a binomial(pairs, 1/2)
    low = ordered[max(0, math.floor(pairs / 2 - reach))]
    high = ordered[min(pairs - 1, math.ceil(pairs / 2 + reach))]
    return bool(high - low <= 2 * half_width)


def _measurement(track: _Track, typical: float, generator: np.random.Generator) -> Measurement:
    ratios = np.asarray(track.log_ratios, dtype=np.float64)
    middle = float(np.median(ratios))
    low, high = median_interval(ratios, generator)
    ratio = math.exp(middle)
    stopped_by: Literal["width", "time"] = "width" if track.narrow else "time"
    bounds = (math.exp(min(low, middle)), math.exp(max(high, middle)))
    return Measurement(ratio, *bounds, ratio * typical, len(ratios), stopped_by)


def median_interval(
    values: NDArray[np.float64], generator: np.random.Generator
) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the median of `values` [n]."""
    picks = generator.integers(len(values), size=(RESAMPLES, len(values)))
    medians = np.median(values[picks], axis=1)
    low, high = np.quantile(medians, [0.025, 0.975])
    return float(low), float(high)
