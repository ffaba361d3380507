"""Tucker-2 of a convolution: few input channels, a small kernel over them, then all outputs.

Kim and others, 2016 ("Compression of deep convolutional neural networks for fast and low power
mobile applications", section 3); HALOC (Xiao and others, 2023) searches its ranks. The start is the
higher-order SVD, which higher-order orthogonal iteration improves (De Lathauwer and others, 2000).
"""

import torch
from torch import Tensor

from apportion.spaces.compressors.factorize import DAMPING, root_of

ITERATIONS = 10


def tucker2(
    weight: Tensor, rank: int, input_rank: int, second_moment: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(left [out, rank], core [rank, input_rank * positions], right [input_rank, channels]).

    Without a second moment, for the least squared error of the weights. With one, for that of the
    outputs, in two steps. The input channels' space is found as without, but with each channel
    weighed by the moment of channels, the mean over positions. Given that space, core and left
    factor are the optimum (reduced-rank regression: Izenman, 1975) under the whole moment, whose
    diagonal is raised as in `low_rank`.

    Args:
        weight: [out, channels, positions].
        rank: Of the output channels, at most min(out, input_rank * positions).
        input_rank: At most min(channels, rank * positions).
        second_moment: float64 [channels * positions]^2, the sum of x x^T over unfolded inputs, a
            channel's positions next to each other; or None.
    """
    exact = weight.double()
    if second_moment is None or not second_moment.diagonal().mean() > 0:
        right = _input_space(exact, rank, input_rank).T
        reduced = torch.einsum("ocp,ic->oip", exact, right).flatten(1)
        left = _leading(reduced, rank)
        return left, left.T @ reduced, right
    moment = second_moment / second_moment.diagonal().mean()
    right = _seen_space(exact, rank, input_rank, moment).T
    left, core = _regressed(exact, right, rank, moment)
    return left, core, right


def _input_space(weight: Tensor, rank: int, input_rank: int) -> Tensor:
    """[channels, input_rank], orthonormal: the input channels' factor after some iterations."""
    inputs = _leading(weight.transpose(0, 1).flatten(1), input_rank)
    for _ in range(ITERATIONS):
        outputs = _leading(torch.einsum("ocp,ci->oip", weight, inputs).flatten(1), rank)
        inputs = _leading(torch.einsum("ocp,or->crp", weight, outputs).flatten(1), input_rank)
    return inputs


def _seen_space(weight: Tensor, rank: int, input_rank: int, moment: Tensor) -> Tensor:
    """`_input_space` of inputs whose channels have the moment S S^T: of the weight times S.

    A factor U for S^-1 x is S^-T U for x; its columns are made orthonormal.
    """
    _, channels, positions = weight.shape
    grid = moment.view(channels, positions, channels, positions)
    root = root_of(grid.diagonal(dim1=1, dim2=3).mean(-1), channels)
    whitened = _input_space(torch.einsum("ocp,cd->odp", weight, root), rank, input_rank)
    space: Tensor = torch.linalg.qr(torch.linalg.solve(root.T, whitened)).Q
    return space


def _regressed(weight: Tensor, right: Tensor, rank: int, moment: Tensor) -> tuple[Tensor, Tensor]:
    """(left [out, rank], core [rank, input_rank * positions]) of least output error given `right`.

    With z what `right` leaves of the inputs x, and T T^T its moment: all outputs regressed on z are
    F T^-1 z, and of rank k at best U U^T F T^-1 z, with U the leading left singular vectors of F.
    """
    _, channels, positions = weight.shape
    size = len(right) * positions
    seen = moment.view(channels, positions, -1)
    cross = torch.einsum("ic,cpx->ipx", right, seen).reshape(size, channels, positions)
    inner = torch.einsum("zcp,ic->zip", cross, right).reshape(size, size)
    inner = (inner + inner.T) / 2
    inner.diagonal().add_(DAMPING)
    eigenvalues, eigenvectors = torch.linalg.eigh(inner)
    inverse_root = eigenvectors * eigenvalues.clamp_min(DAMPING).rsqrt()
    damped = DAMPING * torch.einsum("ocp,ic->oip", weight, right).flatten(1)
    fitted = (weight.flatten(1) @ cross.reshape(size, -1).T + damped) @ inverse_root
    left = _leading(fitted, rank)
    return left, left.T @ fitted @ inverse_root.T


def _leading(matrix: Tensor, count: int) -> Tensor:
    """The leading left singular vectors [rows, count] of a wide matrix, from its Gram matrix."""
    vectors: Tensor = torch.linalg.eigh(matrix @ matrix.T).eigenvectors
    return vectors[:, -count:].flip(1)
