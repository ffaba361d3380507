"""Random weights in stored formats: what is timed before anything is compressed."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from apportion.kernels.formats import DTYPES, Format, LayerShape, StoredWeight, layout
from apportion.kernels.packing import pack_mask
from apportion.kernels.positions import pack_positions
from apportion.kernels.reference import ACTIVATION_LEVELS
from apportion.spaces.compressors.sparsify import removed_count
from apportion.spaces.grammar import Option
from apportion.spaces.parts import first_units, parts
from apportion.spaces.sites import Site
from apportion.spaces.space import DROP_MEAN, Space
from apportion.spaces.stored import Stored, StoredSite

TIMED_RANGE = 4.0
"""Of the activations that are timed: they are normal."""


def nonzeros_of(option: Option, shape: LayerShape) -> int | None:
    """Stored entries of one weight under a sparse option; None under any other."""
    if option.sparsity is None:
        return None
    return shape.weights - removed_count(option.sparsity, shape.weights)


def random_stored(
    format: Format, shape: LayerShape, seed: int, nonzeros: int | None = None
) -> StoredWeight:
    """Random values in a stored format, of a size that keeps a model's activations finite.

    Args:
        format: how it is stored.
        shape: the layer.
        seed: of the values.
        nonzeros: stored entries of a sparse format.
    """
    generator = torch.Generator().manual_seed(seed)
    size = 1 / math.sqrt(shape.in_features)
    tensors: dict[str, Tensor] = {}
    for name, (dtype, dims) in layout(format, shape, nonzeros).items():
        if name == "mask":
            kept = torch.zeros(shape.weights, dtype=torch.bool)
            kept[torch.randperm(shape.weights, generator=generator)[:nonzeros]] = True
            tensors[name] = pack_mask(kept)
        elif name == "codes":
            tensors[name] = torch.randint(256, dims, generator=generator, dtype=dtype)
        elif name == "scale":
            level = size / 2 ** ((format.bits or 8) - 1)
            tensors[name] = (level * (0.5 + torch.rand(dims, generator=generator))).to(dtype)
        elif name == "activation_scale":
            tensors[name] = torch.full(dims, TIMED_RANGE / ACTIVATION_LEVELS, dtype=dtype)
        elif name == "input_scale":
            tensors[name] = (0.5 + torch.rand(dims, generator=generator)).to(dtype)
        else:
            tensors[name] = (size * torch.randn(dims, generator=generator)).to(dtype)
    if format.outliers is not None:
        chosen = torch.randperm(shape.weights, generator=generator)[: format.outliers]
        places, counts = pack_positions(chosen.sort().values, shape.weights)
        tensors |= {"outlier_places": places, "outlier_counts": counts}
    return StoredWeight(format, shape, tensors)


def random_weights(space: Space, dtype: str, rank_multiple: int) -> Stored:
    """What `apply` asks for the stored weights of a site under an option: random ones."""
    places: Mapping[str, int] = space.names

    def stored(site: Site, option: Option) -> StoredSite:
        if str(option) == DROP_MEAN:
            return StoredSite((), constant=torch.zeros(site.constant, dtype=DTYPES[dtype]))
        launched = parts(site, option, dtype, rank_multiple)
        layers = [pair for p in launched for pair in zip(p.formats, p.shapes, strict=True)]
        weights = [
            random_stored(
                format,
                shape,
                seed=places[site.name] * 100 + number,
                nonzeros=nonzeros_of(option, shape),
            )
            for number, (format, shape) in enumerate(layers)
        ]
        return StoredSite(tuple(weights), first_units(site, option, rank_multiple))

    return stored
