"""Attention whose heads have fewer value dimensions, put in place without its code noticing."""

from torch import nn

from apportion.kernels.padded import HeadStarts, PaddedHeads
from apportion.spaces.compressors.values import value_cuts
from apportion.spaces.sites import Width


def pad_heads(model: nn.Module, width: Width, kept: int) -> None:
    """Have narrower value and output layers give and take as much as the dense ones, in place.

    Of other widths than value dimensions nothing has to be padded.

    Args:
        model: its layers under the width's paths are the narrower ones.
        width: what the sub-block is narrower by.
        kept: how many units stay.
    """
    if width.unit != "value":
        return
    made, read = value_cuts(width)
    places, size = made.places(range(kept), width.units), made.member.shape.out_features
    values, output = (model.get_submodule(cut.member.module) for cut in (made, read))
    model.set_submodule(made.member.module, PaddedHeads(values, places, size).eval())
    model.set_submodule(read.member.module, HeadStarts(output, read.stacks, kept).eval())
