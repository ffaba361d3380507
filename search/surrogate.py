"""The additive model, corrected by what whole configurations have been measured to lose.

Predicted loss = sum over sites of (one-option loss x factor). The factors have mean 1 and a prior
variance that is shared by all, shared within a site, and their own (a Gaussian process with a
linear kernel, which is ridge regression towards the measured table). Residuals are relative to
the measured loss, so that the fit holds over decades of loss, and count the less the further a
configuration's loss is from the best one's: the correction is local, where the search is.
"""

from dataclasses import dataclass

import numpy as np

from apportion.search.ledger import Ledger
from apportion.search.problem import Config, Floats, Problem

SHARED, SITE, OWN = 0.5, 0.3, 0.3  # prior standard deviations of a factor's three parts
NOISES = (0.01, 0.03, 0.1, 0.3, 1.0)  # of the relative residual; chosen by leaving one out
LEAST_FACTOR = 0.05
MOST = 700  # observations: a fit takes the cube of their number
FLOOR = 0.02  # a one-option loss below this share of the median one is taken to be noise


@dataclass(frozen=True, eq=False)
class Observations:
    """Measured configurations: [n, sites] options, [n] full-slice losses, [n] relative trust."""

    configs: list[Config]
    losses: Floats
    noise: Floats


class Surrogate:
    """A posterior over the loss table."""

    def __init__(self, problem: Problem, seen: Observations) -> None:
        """Fits; `problem` has a loss table."""
        self.table = floored(problem)
        self.rows = np.arange(problem.sites)
        self._neutral = problem.neutral
        usable = [i for i, config in enumerate(seen.configs) if self._known(config)]
        configs = np.array([seen.configs[i] for i in usable], dtype=np.int64)
        configs = configs.reshape(-1, problem.sites)
        void = np.array([problem.void(seen.configs[i]) for i in usable], dtype=np.bool_)
        losses = seen.losses[usable]
        self.design = np.zeros((len(usable), *self.table.shape))
        parts = self.table[self.rows, configs] * ~void.reshape(configs.shape)
        each = np.arange(len(usable))[:, None]
        self.design[each, self.rows, configs] = parts / losses[:, None]
        self.residual = 1.0 - self.design.sum(axis=(1, 2))
        self.noise = self._choose_noise(seen.noise[usable])

    def mean_table(self) -> Floats:
        """[sites, options] the table with the posterior's mean factors."""
        return self._scaled(1.0 + self._update(self.residual))

    def sampled_table(self, rng: np.random.Generator) -> Floats:
        """[sites, options] a table drawn from the posterior (Matheron's rule)."""
        shape = self.table.shape
        prior = SHARED * rng.standard_normal() + SITE * rng.standard_normal((shape[0], 1))
        prior = prior + OWN * rng.standard_normal(shape)
        imagined = np.tensordot(self.design, prior, axes=2)
        imagined = imagined + np.sqrt(self.noise) * rng.standard_normal(len(self.noise))
        return self._scaled(1.0 + prior + self._update(self.residual - imagined))

    def _scaled(self, factors: Floats) -> Floats:
        barred = ~np.isfinite(self.table)
        scaled = np.where(barred, 0.0, self.table) * np.maximum(factors, LEAST_FACTOR)
        return np.asarray(np.where(barred, np.inf, scaled))

    def _known(self, config: Config) -> bool:
        return bool(np.isfinite(self.table[self.rows, config]).all())

    def _spread(self, weights: Floats) -> Floats:
        """The prior covariance times [sites, options] weights."""
        site = weights.sum(axis=1, keepdims=True)
        return np.asarray(SHARED**2 * weights.sum() + SITE**2 * site + OWN**2 * weights)

    def _kernel(self) -> Floats:
        flat, site = self.design.reshape(len(self.design), -1), self.design.sum(axis=2)
        whole = site.sum(axis=1)
        kernel = SHARED**2 * np.outer(whole, whole) + SITE**2 * site @ site.T
        return np.asarray(kernel + OWN**2 * flat @ flat.T)

    def _update(self, residual: Floats) -> Floats:
        if not len(residual):
            return np.zeros_like(self.table)
        weights = np.linalg.solve(self._kernel() + np.diag(self.noise), residual)
        return self._spread(np.tensordot(weights, self.design, axes=1))

    def _choose_noise(self, relative: Floats) -> Floats:
        """Least squared error of each left out, in the units of its own noise."""
        if not len(relative):
            return relative
        kernel = self._kernel()

        def left_out(noise: float) -> float:
            inverse = np.linalg.inv(kernel + noise**2 * np.diag(relative))
            errors = (inverse @ self.residual) / np.diag(inverse)
            return float((errors**2 / relative).sum())

        return min(NOISES, key=left_out) ** 2 * relative


def floored(problem: Problem) -> Floats:
    """The additive table with every loss of a real change at least a trifle.

    An option whose loss is 0 by noise could otherwise never be found to cost anything.
    """
    table = problem.additive.copy()
    positive = table[np.isfinite(table) & (table > 0)]
    least = FLOOR * float(np.median(positive)) if positive.size else 1e-12
    table = np.where(np.isfinite(table), np.maximum(table, least), table)
    table[np.arange(problem.sites), problem.neutral] = 0.0
    return table


def observations(ledger: Ledger, best: Config | None) -> Observations:
    """All that is known on the full slice, and what is known on parts of it, put on its scale.

    A part's loss is multiplied by the best configuration's ratio of full loss to loss on that
    part: most of the difference between windows is common to all configurations. Of more than
    `MOST` those that count the most.
    """
    full, windows = ledger.settings.full, ledger.settings.windows
    reference = 0.0 if best is None else ledger.mean(best)
    neutral = ledger.problem.neutral_config
    found: dict[Config, tuple[float, float]] = {}
    for config, part in ledger.results:
        if config == neutral:
            continue
        brief = 0.0 if best is None else ledger.mean(best, part)
        ratio = reference / brief if brief > 0 and part != full else 1.0
        if part == full or config not in found:
            found[config] = (ledger.mean(config, part) * ratio, windows / part.windows)
    usable = {c: v for c, v in found.items() if np.isfinite(v[0]) and v[0] > 0}
    losses = np.array([loss for loss, _ in usable.values()])
    noise = np.array([relative for _, relative in usable.values()])
    far = np.log(losses / reference) ** 2 if reference > 0 else np.zeros_like(losses)
    noise = noise * (1.0 + far)
    kept = np.sort(np.argsort(noise, kind="stable")[:MOST])
    configs = list(usable)
    return Observations([configs[i] for i in kept], losses[kept], noise[kept])
