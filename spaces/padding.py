"""Attention whose heads have fewer value dimensions, put in place without its code noticing."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from apportion.kernels.padded import HeadStarts, PaddedHeads
from apportion.spaces.compressors.values import value_cuts
from apportion.spaces.sites import Cut, Member, Width


@dataclass(frozen=True)
class Padding:
    """How a narrower layer gives or takes as much as the dense one.

    Attributes:
        cut: of the dense layer.
        units: value dimensions of a head.
        kept: how many of them stay.
    """

    cut: Cut
    units: int
    kept: int

    def around(self, layer: nn.Module) -> nn.Module:
        """What stands in the dense layer's place."""
        if self.cut.side == "in":
            return HeadStarts(layer, self.cut.stacks, self.kept).eval()
        places = self.cut.places(range(self.kept), self.units)
        return PaddedHeads(layer, places, self.cut.member.shape.out_features).eval()


def paddings(width: Width, kept: int) -> Mapping[Member, Padding]:
    """The members of a sub-block that are padded; none but of a width in value dimensions.

    Args:
        width: what the sub-block is narrower by.
        kept: how many units stay.
    """
    cuts = value_cuts(width) if width.unit == "value" else ()
    return {cut.member: Padding(cut, width.units, kept) for cut in cuts}


def pad_heads(model: nn.Module, width: Width, kept: int) -> None:
    """Have narrower value and output layers give and take as much as the dense ones, in place.

    Of other widths than value dimensions nothing has to be padded.

    Args:
        model: its layers under the width's paths are the narrower ones.
        width: what the sub-block is narrower by.
        kept: how many units stay.
    """
    for member, padding in paddings(width, kept).items():
        model.set_submodule(member.module, padding.around(model.get_submodule(member.module)))
