"""Outlier ratios against a float64 reference, and the sparsities that follow from them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from apportion.spaces.calibration import collect
from apportion.spaces.discovery import discover
from apportion.spaces.entries import Entry, build_space
from apportion.spaces.outlier_ratios import SPREAD, block_of, block_sparsities, outlier_ratios
from apportion.spaces.statistics import StatisticsFiles, write_statistics

WIDTH = 24


class Block(nn.Module):
    """Two layers; some weights are large, of another share in each block."""

    def __init__(self, outliers: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        with torch.no_grad():
            self.up.weight[:outliers, :7] *= 30

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(outliers) for outliers in (1, 8, 3))
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@pytest.fixture(name="net")
def _net() -> Net:
    torch.manual_seed(0)
    return Net()


def inputs_of(net: Net, data: Tensor) -> dict[str, Tensor]:
    """Layer -> [tokens, in], float64."""
    seen: dict[str, Tensor] = {}
    for name, layer in net.named_modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_pre_hook(
                lambda _, args, name=name: seen.update({name: args[0].double()})
            )
    with torch.no_grad():
        net(data)
    return seen


def test_ratios_are_those_of_the_definition(net: Net, tmp_path: Path) -> None:
    data = torch.randn(50, WIDTH)
    data[:, 3] *= 20
    sites = discover(net, data).sites
    space = build_space(sites, [Entry(("linear:*",), ("dense", "s40%", "s60%"))], 8)
    write_statistics(tmp_path / "all", collect(net, space.input_sites, [data]))
    files = StatisticsFiles(dict.fromkeys((s.name for s in space.sites), tmp_path / "all"))
    blocks = [site for site in sites if site.kind == "block"]
    found = outlier_ratios(net, space, blocks, files)

    inputs = inputs_of(net, data)
    expected = {}
    for number, block in enumerate(net.blocks):
        scores = [
            (layer.weight.detach().double().abs() * inputs[f"blocks.{number}.{name}"].norm(dim=0))
            for name, layer in block.named_children()
        ]
        together = torch.cat([score.flatten() for score in scores]).numpy()
        expected[f"blocks.{number}"] = np.mean(together > 5 * together.mean())
    assert found == pytest.approx(expected, abs=1e-12)
    assert found["blocks.1"] > found["blocks.2"] > found["blocks.0"] > 0


def test_blocks_of_unknown_inputs_are_left_out(net: Net, tmp_path: Path) -> None:
    data = torch.randn(50, WIDTH)
    sites = discover(net, data).sites
    space = build_space(sites, [Entry(("linear:*",), ("dense", "s50%"))], 8)
    sums = collect(net, space.input_sites, [data])
    write_statistics(
        tmp_path / "some", {n: s for n, s in sums.items() if not n.startswith("blocks.1")}
    )
    files = StatisticsFiles(dict.fromkeys((s.name for s in space.sites), tmp_path / "some"))
    blocks = [site for site in sites if site.kind == "block"]
    assert set(outlier_ratios(net, space, blocks, files)) == {"blocks.0", "blocks.2"}


def test_head_lies_in_no_block(net: Net) -> None:
    sites = discover(net, torch.randn(2, WIDTH)).sites
    blocks = [site for site in sites if site.kind == "block"]
    found = {site.name: block_of(site, blocks) for site in sites if site.members}
    assert found["head"] is None
    assert found["blocks.1.up"] == "blocks.1"


@given(
    sparsity=st.floats(0.1, 0.9),
    blocks=st.lists(st.tuples(st.floats(0, 1), st.integers(1, 10**9)), min_size=1, max_size=40),
)
def test_sparsities_keep_the_mean_and_fall_as_outliers_rise(
    sparsity: float, blocks: list[tuple[float, int]]
) -> None:
    outliers = {str(place): ratio for place, (ratio, _) in enumerate(blocks)}
    weights = {str(place): count for place, (_, count) in enumerate(blocks)}
    found = block_sparsities(sparsity, outliers, weights)
    removed = sum(found[block] * weights[block] for block in found)
    assert removed == pytest.approx(sparsity * sum(weights.values()), rel=1e-9)
    for one in found:
        for other in found:
            assert outliers[one] >= outliers[other] or found[one] >= found[other]
    if len(set(outliers.values())) > 1:
        assert max(found.values()) - min(found.values()) == pytest.approx(2 * SPREAD)
    else:
        assert set(found.values()) == {sparsity}


def test_equal_blocks_get_what_the_paper_says() -> None:
    # min-max to [0, 2 lambda], less the mean, taken from S: 0.7 +- what is worked out by hand
    found = block_sparsities(
        0.7, {"a": 0.01, "b": 0.03, "c": 0.02, "d": 0.01}, dict.fromkeys("abcd", 9)
    )
    assert found == pytest.approx({"a": 0.76, "b": 0.6, "c": 0.68, "d": 0.76})
