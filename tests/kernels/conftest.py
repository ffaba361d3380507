"""Stored weights of any format, filled at random by their layout, without a compressor."""

from collections.abc import Callable

import pytest
import torch

from apportion.kernels.formats import Format, LayerShape, StoredWeight, layout
from apportion.kernels.packing import pack_mask
from apportion.kernels.positions import pack_positions

Store = Callable[..., StoredWeight]


def _random(name: str, dtype: torch.dtype, size: tuple[int, ...]) -> torch.Tensor:
    if dtype == torch.uint8:
        return torch.randint(0, 256, size, dtype=torch.uint8)
    if name == "input_scale":
        return (torch.rand(size) + 0.5).to(dtype)
    if name == "activation_scale":
        return torch.full(size, 0.02, dtype=dtype)  # of normal inputs one in a hundred saturates
    values = torch.rand(size) * 0.01 + 0.001 if name == "scale" else torch.randn(size) * 0.1
    return values.to(dtype)


@pytest.fixture
def store() -> Store:
    def make(format: Format, shape: LayerShape, seed: int = 0) -> StoredWeight:
        torch.manual_seed(seed)
        mask = torch.rand(shape.weights) < 0.4
        nonzeros = int(mask.sum()) if format.sparse else None
        wanted = layout(format, shape, nonzeros)
        tensors = {name: _random(name, *entry) for name, entry in wanted.items()}
        if format.sparse:
            tensors["mask"] = pack_mask(mask)
        if format.outliers:
            chosen = torch.randperm(shape.weights)[: format.outliers].sort().values
            places, counts = pack_positions(chosen, shape.weights)
            tensors |= {"outlier_places": places, "outlier_counts": counts}
        return StoredWeight(format, shape, tensors)

    return make
