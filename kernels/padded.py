"""Layers that hold fewer features of some heads than the code around them counts on."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class PaddedHeads(nn.Module):
    """x [..., in] -> [..., out]: what a layer gives, and zeros for the outputs that it lacks."""

    places: Tensor

    def __init__(self, layer: nn.Module, places: Sequence[int], size: int) -> None:
        """Takes the place of a larger layer.

        Args:
            layer: gives [..., len(places)].
            places: of each of its outputs the number among those of the larger layer.
            size: how many outputs that one has.
        """
        super().__init__()
        self.layer = layer
        self.size = size
        self.register_buffer("places", torch.tensor(places), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        given = self.layer(x)
        padded: Tensor = given.new_zeros(*given.shape[:-1], self.size)
        return padded.index_copy_(-1, self.places, given)


class HeadStarts(nn.Module):
    """x [..., heads * size] -> [..., out]: a layer on the first features of each head."""

    def __init__(self, layer: nn.Module, heads: int, features: int) -> None:
        """Takes the place of a layer that reads whole heads.

        Args:
            layer: reads [..., heads * features].
            heads: how many there are.
            features: the first ones of each head, all that `layer` reads.
        """
        super().__init__()
        self.layer = layer
        self.heads = heads
        self.features = features

    def forward(self, x: Tensor) -> Tensor:
        starts = torch.unflatten(x, -1, (self.heads, -1))[..., : self.features]
        output: Tensor = self.layer(starts.flatten(-2))
        return output
