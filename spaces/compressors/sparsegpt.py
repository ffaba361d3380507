"""Removing weights so that the ones that stay make up for them: SparseGPT."""

from decimal import Decimal

import torch
from torch import Tensor

from apportion.errors import InvalidInput
from apportion.spaces.compressors.compensate import BLOCK, compensate, regression
from apportion.spaces.compressors.sparsify import dead_first, removed_count


def sparsegpt(
    weight: Tensor, sparsity: Decimal | tuple[int, int], second_moment: Tensor
) -> tuple[Tensor, Tensor]:
    """(kept bool [out, in], float32 [out, in]): which weights stay, and their corrected values.

    SparseGPT (Frantar and Alistarh, 2023, algorithm 1): what goes is chosen for 128 inputs at a
    time over all rows (n:m: for m inputs at a time in each row) after the inputs before them left
    their errors; the least w^2 times the mean square that later inputs do not predict goes first.
    Only the choice depends on the level, so all levels of a layer share one factorization.

    Args:
        weight: float32 [out, in], finite.
        sparsity: The percentage of weights removed, with the count of `removed_count` in total and
            up to any multiple of 128 inputs; or (n, m): n of every m consecutive inputs are kept.
        second_moment: float64 [in, in], finite, the sum of x x^T. Dead inputs go first, the
            smallest of their weights before the others; a singular moment is treated as
            `regression` says.

    Raises:
        InvalidInput: m does not divide the inputs.
    """
    out, inputs = weight.shape
    span = sparsity[1] if isinstance(sparsity, tuple) else BLOCK
    if isinstance(sparsity, tuple) and inputs % span:
        raise InvalidInput(f"{sparsity[0]}:{span} needs a multiple of {span} inputs, not {inputs}")
    prediction = regression(second_moment, by_activity=False)
    # Of a weight that is stored as [in, out], .contiguous() would be no copy but the model's own.
    columns = weight.T.clone(memory_format=torch.contiguous_format)
    kept = torch.empty(columns.shape, dtype=torch.bool)

    def choose(start: int, stop: int) -> Tensor:
        left, sizes = prediction.unpredicted[start:stop, None], columns[start:stop].abs()
        scores = dead_first(sizes.square() * left, sizes, left == 0)
        if isinstance(sparsity, tuple):
            return _keep_largest(scores, sparsity[1] - sparsity[0])
        removed = removed_count(sparsity, out * stop) - removed_count(sparsity, out * start)
        return _keep_largest(scores.flatten(), removed).view_as(scores)

    def store(j: int) -> Tensor:
        if j % span == 0:
            stop = min(j + span, inputs)
            kept[j:stop] = choose(j, stop)
        return columns[j].where(kept[j], 0)

    compensate(columns, prediction.coefficients, store, max(BLOCK // span, 1) * span)
    return kept.T.contiguous(), columns.T.contiguous()


def _keep_largest(scores: Tensor, removed: int) -> Tensor:
    """bool like `scores`, False for the `removed` smallest along its first dimension."""
    order = scores.argsort(dim=0, stable=True)
    return torch.ones_like(scores, dtype=torch.bool).scatter_(0, order[:removed], False)
