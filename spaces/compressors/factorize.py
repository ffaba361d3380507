"""Low-rank pairs: the best rank-k stand-in for a matrix, for its own sake or for its inputs."""

from decimal import Decimal
from functools import lru_cache

import torch
from torch import Tensor

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
    exact = weight.double()
    leading = torch.linalg.svd(exact @ root_of(second_moment, weight.shape[1]), full_matrices=False)
    left = leading.U[:, :rank]
    return left, left.T @ exact


# The options of one site follow each other, and all take the root of the same moment.
@lru_cache(maxsize=1)
def root_of(second_moment: Tensor | None, inputs: int) -> Tensor:
    """S [in, in] with S S^T the damped second moment; the identity where there is nothing."""
    identity = torch.eye(inputs, dtype=torch.float64)
    if second_moment is None or not second_moment.diagonal().mean() > 0:
        return identity
    symmetric = (second_moment + second_moment.T) / 2
    scaled = symmetric / symmetric.diagonal().mean()
    eigenvalues, eigenvectors = torch.linalg.eigh(scaled)
    root: Tensor = eigenvectors * (eigenvalues.clamp(min=0.0) + DAMPING).sqrt()
    return root
