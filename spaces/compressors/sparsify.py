"""Which weights are removed: an exact number of them, the least important first."""

from decimal import Decimal

import torch
from torch import Tensor


def removed_count(sparsity: Decimal | tuple[int, int], weights: int) -> int:
    """How many of `weights` go, computed exactly.

    Args:
        sparsity: The percentage removed, the count is rounded half to even; or (n, m): n of every
            m are kept.
        weights: Of a pattern, a multiple of m.
    """
    if isinstance(sparsity, tuple):
        n, m = sparsity
        return weights * (m - n) // m
    return round(sparsity * weights / 100)


def keep_largest(weight: Tensor, percent: Decimal) -> Tensor:
    """bool [out, in], False where |w| is among the smallest of the whole matrix (magnitude)."""
    order = weight.abs().flatten().argsort(stable=True)
    kept = torch.ones(weight.numel(), dtype=torch.bool)
    kept[order[: removed_count(percent, weight.numel())]] = False
    return kept.reshape(weight.shape)


def keep_wanda(weight: Tensor, percent: Decimal, second_moment: Tensor) -> Tensor:
    """bool [out, in], False where |w| * ||x|| is among the smallest of its output row.

    Wanda (Sun and others, 2023). Where the number of removed weights is not a multiple of the
    rows, those rows lose one weight more for which it scores least. Weights of dead inputs (zero on
    the diagonal) go first, the smallest of them before the others.

    Args:
        weight: [out, in].
        percent: The percentage of weights removed.
        second_moment: [in, in], the sum of x x^T; its diagonal holds the squared norms ||x||^2.
    """
    rows, inputs = weight.shape
    scores = _wanda_scores(weight, second_moment)
    each, more = divmod(removed_count(percent, weight.numel()), rows)
    scores, order = scores.sort(dim=1, stable=True)
    removed = torch.arange(inputs).expand(rows, inputs) < each
    if more:
        unlucky = scores[:, each].argsort(stable=True)[:more]
        removed[unlucky, each] = True
    return torch.ones_like(removed).scatter(1, order, ~removed)


def keep_pattern(
    weight: Tensor, pattern: tuple[int, int], second_moment: Tensor | None = None
) -> Tensor:
    """bool [out, in], True for n of every m consecutive inputs of a row: those that score most.

    The score is |w| (Mishra and others, "Accelerating Sparse Deep Neural Networks", 2021) or
    |w| * ||x|| (Wanda, its structured form). Of equal scores the first are removed.

    Args:
        weight: [out, in]; m divides `in`.
        pattern: (n, m).
        second_moment: [in, in], the sum of x x^T, for Wanda's score; None: magnitude.
    """
    n, m = pattern
    if second_moment is None:
        scores = weight.abs().double()
    else:
        scores = _wanda_scores(weight, second_moment)
    order = scores.reshape(-1, m).argsort(dim=1, stable=True)
    kept = torch.ones(order.shape, dtype=torch.bool).scatter(1, order[:, : m - n], False)
    return kept.reshape(weight.shape)


def _wanda_scores(weight: Tensor, second_moment: Tensor) -> Tensor:
    """|w| * ||x||, float64 [out, in]; of dead inputs below all others."""
    sizes = weight.abs().double()
    norms = second_moment.diagonal().clamp_min(0).sqrt()
    return dead_first(sizes * norms, sizes, norms == 0)


def dead_first(scores: Tensor, sizes: Tensor, dead: Tensor) -> Tensor:
    """`scores`, but of the dead inputs' weights below all others, in the order of their sizes.

    Args:
        scores: Of weights, not negative; the least important have the least.
        sizes: |w|.
        dead: bool, whether the calibration inputs of a weight were all zero.
    """
    return torch.where(dead, sizes - 2 * sizes.max(), scores)
