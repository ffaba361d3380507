"""Attention whose heads have fewer dimensions, put in place without its code noticing.

Either narrower layers are padded, or a dense operator has zeros where dimensions are gone. The
first saves work and takes time to pad; which is faster is measured.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from apportion.kernels.formats import DTYPES, Format, StoredWeight
from apportion.kernels.padded import HeadStarts, PaddedHeads
from apportion.kernels.reference import reference_weight
from apportion.spaces.sites import Cut, Member, Width


@dataclass(frozen=True)
class Padding:
    """How a narrower layer gives or takes as much as the dense one.

    Attributes:
        cut: of the dense layer.
        units: value dimensions of a head, or query-key dimensions of all.
        kept: numbers of those that stay, ascending; of values the first ones.
    """

    cut: Cut
    units: int
    kept: tuple[int, ...]

    def around(self, layer: nn.Module) -> nn.Module:
        """What stands in the dense layer's place."""
        if self.cut.side == "in":
            return HeadStarts(layer, self.cut.stacks, len(self.kept)).eval()
        return PaddedHeads(layer, self.places, self.cut.member.shape.out_features).eval()

    @property
    def places(self) -> list[int]:
        """The rows of the dense layer (columns where it reads values) that stay."""
        return self.cut.places(self.kept, self.units)

    def in_zeros(self, matrix: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """A narrower matrix [out, in] and its bias [out] as large as the dense ones."""
        shape = self.cut.member.shape
        whole = matrix.new_zeros(shape.out_features, shape.in_features)
        places = torch.tensor(self.places)
        if self.cut.side == "in":
            return whole.index_copy_(1, places, matrix), bias
        if bias is not None:
            bias = bias.new_zeros(shape.out_features).index_copy_(0, places, bias)
        return whole.index_copy_(0, places, matrix), bias


DENSE_DTYPES = {"linear.f32": "float32", "linear.bf16": "bfloat16", "linear.fp16": "float16"}
"""What the implementations compute in that may hold zeros in place of being padded."""
ZEROS = "+zeros"
"""Ends the name of such an implementation where it does."""


def served_by(name: str) -> str:
    """The registry's name of an implementation that may hold zeros."""
    return name.removesuffix(ZEROS)


def in_zeros(
    weights: Sequence[StoredWeight],
    biases: Sequence[Tensor | None],
    padded: Sequence[Padding | None],
    dtype: str,
) -> tuple[list[StoredWeight], list[Tensor | None]]:
    """The layers of a group unpacked, as large as the dense ones, and their biases.

    Args:
        weights: of the group.
        biases: [out] of each, or None.
        padded: of each what it would be padded by, or None.
        dtype: that the matrices are to have.
    """
    wholes, offsets = list[StoredWeight](), list[Tensor | None]()
    for weight, bias, padding in zip(weights, biases, padded, strict=True):
        matrix = reference_weight(weight).to(DTYPES[dtype])
        if padding is not None:
            matrix, bias = padding.in_zeros(matrix, bias)
        shape = replace(weight.shape, out_features=len(matrix), in_features=matrix.shape[1])
        wholes.append(StoredWeight(Format(dtype), shape, {"weight": matrix}))
        offsets.append(bias)
    return wholes, offsets


def paddings(width: Width, kept: Sequence[int]) -> Mapping[Member, Padding]:
    """The members of a sub-block that are padded; none but of a width in dimensions of heads.

    Args:
        width: what the sub-block is narrower by.
        kept: numbers of the units that stay, ascending.
    """
    if width.unit not in ("value", "query-key"):
        return {}
    cuts = (cut for cut in width.cuts if cut.side != "whole")
    return {cut.member: Padding(cut, width.units, tuple(kept)) for cut in cuts}


def pad_heads(model: nn.Module, width: Width, kept: Sequence[int]) -> None:
    """Have layers of fewer dimensions give and take as much as the dense ones, in place.

    Of other widths than dimensions of heads nothing has to be padded.

    Args:
        model: its layers under the width's paths are the narrower ones.
        width: what the sub-block is narrower by.
        kept: numbers of the units that stay, ascending.
    """
    for member, padding in paddings(width, kept).items():
        model.set_submodule(member.module, padding.around(model.get_submodule(member.module)))
