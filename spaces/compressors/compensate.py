"""Giving the error of one weight to the weights that are not decided yet, input after input.

Optimal Brain Surgeon (Hassibi and Stork, 1993) as GPTQ (Frantar and others, 2023) and SparseGPT
(Frantar and Alistarh, 2023) use it: the inputs are decided in one fixed order. If the weight of
input j changes by e, the outputs lose e x_j. The part of x_j that the later inputs predict,
x_j ~ sum_k b_jk x_k, is made up for by adding e b_jk to their weights, and e^2 times the mean
square of the rest is lost for good. The sum of these losses is the error of the outputs exactly.

With H the second moment and U the upper Cholesky factor of its inverse (U^T U = H^-1), the papers'
update -U_jk / U_jj is b_jk and their 1 / U_jj^2 is the unpredicted mean square.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from apportion.errors import InvalidInput
from apportion.spaces.compressors.last import Last

DAMPING = 0.01
BLOCK = 128  # columns whose errors reach the rest in one product (the papers' lazy batch)
PARTS = 32  # of a moment, of which one at a time is copied


@dataclass(frozen=True)
class Regression:
    """Every input as its best linear prediction from the inputs that come after it.

    Args:
        order: int64 [in], the inputs in the order in which they are decided.
        coefficients: float32 [in, in], zero up to the diagonal: [j, k] is the weight of input
            order[k] in the prediction of input order[j].
        unpredicted: float32 [in], the mean square that the prediction of input order[j] leaves,
            as a multiple of the inputs' mean square; 0 for dead inputs.
    """

    order: Tensor
    coefficients: Tensor
    unpredicted: Tensor


# The options of one site follow each other, and those of one method share a factorization.
@Last
def regression(second_moment: Tensor, by_activity: bool) -> Regression:
    """Predicts every input from the later ones, in float64: the damped moment is badly conditioned.

    It takes 1.5 times the moment's memory, and a few columns of it, beside the moment.

    Treated so that there is always an answer:
    - The diagonal is raised by 1 % of its mean over the live inputs, as GPTQ and SparseGPT do, so a
      singular moment (few tokens, constant or repeated inputs) has an inverse. A moment that is
      still indefinite, as no sum of x x^T is, is raised by ten times as much, until it is not.
    - Dead inputs (zero on the diagonal) are predicted from nothing and predict nothing.
    - Without a live input all count alike, as if their moment were the identity.

    Args:
        second_moment: float64 [in, in], the sum of x x^T over any number of tokens.
        by_activity: The inputs of the largest mean square first (GPTQ's activation order), ties in
            their natural order; otherwise all in their natural order.

    Raises:
        InvalidInput: The moment is not finite.
    """
    moment, live = live_moment(second_moment)
    order = torch.arange(len(moment))
    if by_activity:
        order = moment.diagonal().argsort(descending=True, stable=True)
    # Cholesky's triangle predicts every input from those before it, so it is given them backwards.
    backwards = order.flip(0)
    root = _root_in_place(_reordered(moment, backwards))
    if root is None:  # indefinite, and overwritten
        moment, _ = live_moment(second_moment)
        root = damped_root(_reordered(moment, backwards))
    deviations = root.diagonal().clone()
    coefficients = _predictions(root, deviations)
    return Regression(order, coefficients, deviations.square_().flip(0).float() * live[order])


def _reordered(moment: Tensor, order: Tensor) -> Tensor:
    """Rows and columns of `moment` [in, in] in another order, in place."""
    for rows in moment.chunk(PARTS):
        rows.copy_(rows[:, order])
    for columns in moment.chunk(PARTS, dim=1):
        columns.copy_(columns[order])
    return moment


def _root_in_place(moment: Tensor) -> Tensor | None:
    """As `damped_root` where it takes one attempt, in the moment's place; else None."""
    moment.diagonal().add_(DAMPING)
    failed = torch.empty((), dtype=torch.int32)
    # Transposed, as LAPACK stores matrices: it is symmetric, and so not copied.
    root: Tensor = torch.linalg.cholesky_ex(moment.T, out=(moment.T, failed))[0]
    return None if failed else root


def _predictions(root: Tensor, deviations: Tensor) -> Tensor:
    """Coefficients float32 [in, in] from the inverse of `root`, whose diagonal is `deviations`."""
    size = len(root)
    coefficients = torch.empty(size, size)
    for places in torch.arange(size).chunk(PARTS):
        start, stop = int(places[0]), int(places[-1]) + 1
        part = torch.zeros(size, stop - start, dtype=root.dtype)
        part[start:stop].fill_diagonal_(1)
        part = torch.linalg.solve_triangular(root, part, upper=False).mul_(-deviations[:, None])
        coefficients[:, size - stop : size - start] = part.flip(0, 1)
    return coefficients.triu_(1)


def live_moment(second_moment: Tensor) -> tuple[Tensor, Tensor]:
    """The moment as a multiple of the live inputs' mean square, and bool [in], which live.

    Symmetric, and zero in the rows and columns of dead inputs (zero on the diagonal). Without a
    live input all count alike, as if their moment were the identity.

    Args:
        second_moment: float64 [in, in], the sum of x x^T.

    Raises:
        InvalidInput: It is not finite.
    """
    if not second_moment.isfinite().all():
        raise InvalidInput("calibration inputs hold values that are not finite (NaN or infinite)")
    moment = second_moment / 2
    moment.add_(second_moment.T, alpha=0.5)
    live = moment.diagonal() > 0
    if not live.any():
        live, moment = ~live, torch.eye(len(moment), dtype=torch.float64)
    moment /= moment.diagonal()[live].mean()
    moment[~live] = 0
    moment[:, ~live] = 0
    return moment, live


def damped_root(moment: Tensor) -> Tensor:
    """Lower triangular L [in, in] with L L^T = `moment`, whose diagonal it raises in place."""
    root: Tensor
    damping = DAMPING
    while True:
        moment.diagonal().add_(damping)
        root, failed = torch.linalg.cholesky_ex(moment)
        if not failed:
            return root
        damping *= 10


def compensate(
    columns: Tensor,
    coefficients: Tensor,
    store: Callable[[int], Tensor],
    block: int = BLOCK,
) -> None:
    """Replaces column after column by what is stored of it; the later ones make up for the error.

    In float32: sums of some hundred errors are exact to 1e-6 of a weight, where rounding moves it
    by far more. Against float64 at most one code in 10,000 differed (those next to a tie), the
    output error by less than 1e-4 of itself.

    Args:
        columns: float32 [in, out], the weights in the order of the regression; overwritten.
        coefficients: float32 [in, in] of that regression.
        store: What is stored of `columns[j]`, [out]; called for j = 0, 1, ... when the rows from j
            to the end of its block hold all that the ones before j left them.
        block: Inputs whose errors are gathered before they reach the rows after the block.
    """
    for start in range(0, len(columns), block):
        stop = min(start + block, len(columns))
        errors = torch.empty_like(columns[start:stop])
        for j in range(start, stop):
            stored = store(j)
            error = torch.sub(columns[j], stored, out=errors[j - start])
            columns[j] = stored
            columns[j + 1 : stop].addr_(coefficients[j, j + 1 : stop], error)
        columns[stop:].addmm_(coefficients[start:stop, stop:].T, errors)
