"""A configuration as a dozen parameters at most: its sites by the hundred make no picture."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import lru_cache
from statistics import fmean

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
)

from apportion.kernels.codes import TERNARY_BITS
from apportion.spaces.grammar import STRUCTURE_NAMES, Option, parse_option
from apportion.studies.database.rows import NewTrial
from apportion.studies.specification import StudySpec

DENSE, QUANTIZED, SPARSE, LOW_RANK, DROPPED = FAMILIES = (
    "dense",
    "quantized",
    "sparse",
    "low_rank",
    "dropped",
)
THIRDS = ("early", "middle", "late")
# Optuna refuses other choices than those of a study's first trial, so they are the same for all.
ORIGINS = ("score", "uniform", "greedy", "ilp", "evopress", "hybrid", "optuna", "other")
DTYPE_BITS = {"float32": 32, "bfloat16": 16, "float16": 16, "f32": 32, "bf16": 16, "fp16": 16}
SCALE_BITS = {True: 16, False: 32}  # symmetric or not, per group
MASK_BITS = 1
OUTLIER_BITS = 25.4  # its bfloat16 value and, where 1 % are outliers, its place
TERNARY_STORED_BITS = 1.6  # five codes to a byte
BITS = FloatDistribution(0.0, 64.0)  # w7g1 behind a mask has 40
SHARE = FloatDistribution(0.0, 1.0)


@dataclass(frozen=True)
class Aggregates:
    """The parameters of a study's trials.

    * `origin`: which part of the solver proposed it, one of `ORIGINS`.
    * `bits`: the cost of that name, exact.
    * `bits_early`, `bits_middle`, `bits_late`: of the first, second and last third of the weight
      sites in the model's order: the mean over sites of stored bits per weight. Dropped: 0.
      Residuals, and what `v` saves, are left out: their size depends on the layer.
    * `share_FAMILY`: the share of weight sites that are dense (in any dtype), quantized, sparse
      (channels removed included), low_rank (residuals included), dropped (with what they lie in).
      `s50%+w4g64` counts for two. Only families that the study's space offers.

    Attributes:
        dense_bits: of one weight in the model's dtype.
        families: those that the space offers.
    """

    dense_bits: int
    families: Collection[str]

    @classmethod
    def of(cls, spec: StudySpec) -> "Aggregates":
        """Those of a study."""
        options = {parse_option(text) for entry in spec.space for text in entry.options}
        offered = {family for option in options for family in _families(option)}
        families = tuple(family for family in FAMILIES if family in offered)
        return cls(DTYPE_BITS[spec.model.dtype], families)

    def values(self, trial: NewTrial) -> dict[str, str | float]:
        """Parameter -> value, the same names for all trials of a study."""
        sites = self._weight_sites(trial.configuration)
        values: dict[str, str | float] = {
            "origin": origin_family(trial.origin),
            "bits": trial.costs["bits"],
        }
        for third, part in zip(THIRDS, _parted(sites), strict=True):
            if part:
                values[f"bits_{third}"] = fmean(bits for bits, _ in part)
        for family in self.families:
            values[f"share_{family}"] = fmean(family in found for _, found in sites)
        return values

    def _weight_sites(self, configuration: Mapping[str, str]) -> list[tuple[float, frozenset[str]]]:
        """(stored bits per weight, families) of each weight site, in the model's order.

        A treated sub-block stands for its weight sites, or for itself where none is a site.
        """
        above = {
            f"{site}.": text
            for site, text in configuration.items()
            if parse_option(text).drops or parse_option(text).narrows
        }
        alone = {s for s in above if not any(site.startswith(s) for site in configuration)}
        return [
            _treatment(next((above[s] for s in above if site.startswith(s)), text), self.dense_bits)
            for site, text in configuration.items()
            if not parse_option(text).is_structure
            or (parse_option(text).narrows and f"{site}." in alone)
        ]


def distributions(values: Mapping[str, str | float]) -> dict[str, BaseDistribution]:
    """Parameter -> what Optuna shall believe that it was drawn from."""
    return {name: _distribution(name) for name in values}


def origin_family(origin: str) -> str:
    """ "ilp:near" -> "ilp"."""
    family = origin.partition(":")[0]
    return family if family in ORIGINS else ORIGINS[-1]


def _distribution(name: str) -> BaseDistribution:
    if name == "origin":
        return CategoricalDistribution(ORIGINS)
    return BITS if name.startswith("bits") else SHARE


def _parted(
    sites: Sequence[tuple[float, frozenset[str]]],
) -> list[Sequence[tuple[float, frozenset[str]]]]:
    """The thirds; of fewer than three sites some are empty."""
    ends = [len(sites) * third // len(THIRDS) for third in range(len(THIRDS) + 1)]
    return [sites[start:stop] for start, stop in zip(ends, ends[1:], strict=False)]


@lru_cache(maxsize=4096)
def _treatment(text: str, dense_bits: int) -> tuple[float, frozenset[str]]:
    option = parse_option(text)
    bits = 0.0 if option.drops else _stored_bits(option, dense_bits)
    return bits, _families(option)


def _families(option: Option) -> frozenset[str]:
    has = {
        QUANTIZED: option.bits,
        SPARSE: option.sparsity or option.keep_percent,
        LOW_RANK: option.rank_percent or option.dimension_percent or option.residual_rank,
        DROPPED: option.drops,
        DENSE: option.name not in (None, *STRUCTURE_NAMES),
    }
    return frozenset(family for family, part in has.items() if part)


def _stored_bits(option: Option, dense_bits: int) -> float:
    """Bits per dense weight, as the option grammar counts them."""
    bits: float = DTYPE_BITS.get(option.name or "", dense_bits)
    if option.bits is not None:
        bits = TERNARY_STORED_BITS if option.bits == TERNARY_BITS else option.bits
        if option.group is not None:
            bits += SCALE_BITS[option.symmetric] / option.group
    if option.outlier_percent is not None:
        bits += OUTLIER_BITS * _part(option.outlier_percent)
    if isinstance(option.sparsity, tuple):
        kept, of = option.sparsity
        bits = MASK_BITS + bits * kept / of
    elif option.sparsity is not None:
        bits = MASK_BITS + bits * _part(100 - option.sparsity)
    return bits * _part(option.rank_percent) * _part(option.keep_percent)


def _part(percent: Decimal | None) -> float:
    return 1.0 if percent is None else float(percent) / 100
