"""Low-rank pairs: the best rank-k stand-in for a matrix, for its own sake or for its inputs."""

from decimal import Decimal

import torch
from torch import Tensor

from apportion.spaces.compressors.last import Last

DAMPING = 1e-6


def rank_of(percent: Decimal, out: int, inputs: int, rank_multiple: int) -> int:
    """The rank k with k (in + out) at most percent of in * out, rounded down to the multiple."""
    exact = percent * out * inputs / (100 * (out + inputs))
    return int(exact) // rank_multiple * rank_multiple


def low_rank(weight: Tensor, rank: int, second_moment: Tensor | None) -> tuple[Tensor, Tensor]:
    """(left [out, rank], right [rank, in]) float64 with the least error of left @ right.

    With S S^T = `second_moment`, the error is the Frobenius norm of (weight - left @ right) S,
    which is the error of the outputs on the calibration inputs (SVD-LLM, Wang and others, 2024);
    without it, that of weight - left @ right (plain SVD). With U the leading left singular vectors
    of weight @ S the optimum is U U^T weight, so nothing is ever divided by small eigenvalues.
    The second moment's diagonal is raised by 1e-6 of its mean: directions that no input took are
    then ordered as plain SVD would. Eigenvalues, and not Cholesky, give S: a sum of float32
    products from few tokens can be slightly indefinite.

    Args:
        weight: [out, in].
        rank: At most min(out, in).
        second_moment: float64 [in, in], the sum of x x^T, or None.
    """
    out, inputs = weight.shape
    leading = _of_outputs if out <= inputs else _of_inputs
    left = leading(weight, rank, second_moment)
    return left, left.T @ weight.double()


def _of_outputs(weight: Tensor, rank: int, second_moment: Tensor | None) -> Tensor:
    """Leading left singular vectors [out, rank] of weight @ S: eigenvectors of W (S S^T) W^T.

    They need no root of the second moment, which has more inputs than the outputs are here.
    """
    exact = weight.double()
    taken = exact
    if second_moment is not None and (mean := second_moment.diagonal().mean()) > 0:
        taken = (exact @ second_moment).div_(mean).add_(exact, alpha=DAMPING)
    gram = taken @ exact.T
    vectors: Tensor = torch.linalg.eigh(gram.add_(gram.T.clone()))[1]
    return vectors[:, len(gram) - rank :].flip(1)


def _of_inputs(weight: Tensor, rank: int, second_moment: Tensor | None) -> Tensor:
    """Leading left singular vectors [out, rank] of weight @ S, by way of the right ones."""
    product = weight.double() @ root_of(second_moment, weight.shape[1])
    vectors = torch.linalg.eigh(product.T @ product)[1]
    left: Tensor = torch.linalg.qr(product @ vectors[:, len(vectors) - rank :].flip(1))[0]
    return left


# The options of one site follow each other, and all take the root of the same moment.
@Last
def _damped_root(second_moment: Tensor, damping: float) -> Tensor:
    """S [in, in] with S S^T the second moment, its diagonal raised by a share of its mean."""
    moment = (second_moment + second_moment.T).div_(2)
    moment.div_(moment.diagonal().mean())
    values = torch.empty(len(moment), dtype=moment.dtype)
    # Transposed, as LAPACK stores matrices: it is symmetric, and its vectors take its place.
    root: Tensor = torch.linalg.eigh(moment.T, out=(values, moment.T))[1]
    return root.mul_(values.clamp(min=0.0).add_(damping).sqrt())


def root_of(second_moment: Tensor | None, inputs: int) -> Tensor:
    """S [in, in] with S S^T the damped second moment; the identity where there is nothing."""
    if second_moment is None or not second_moment.diagonal().mean() > 0:
        return torch.eye(inputs, dtype=torch.float64)
    return _damped_root(second_moment, DAMPING)


def forget_root() -> None:
    """Give up the last moment's root."""
    _damped_root.forget()
