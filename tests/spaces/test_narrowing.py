"""Narrowing: what a copy of a sub-block with fewer units holds, shares and says of its sizes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from apportion.kernels.formats import LayerShape
from apportion.spaces.batches import frozen
from apportion.spaces.discovery import discover
from apportion.spaces.narrowing import moved, narrowed_copy, part_of, unit_vectors
from apportion.spaces.sites import Cut, Member, Site, Width

LAYERS = {
    "gpt2": ["transformer.h.1.mlp"],
    "bert": ["bert.encoder.layer.1.attention"],
    "llama": ["model.layers.1.mlp"],
    "conv": ["blocks.0"],
}
CASES = [(family, name) for family, names in LAYERS.items() for name in names]


@pytest.fixture
def narrowable(make_model, make_batch):
    """Family, name -> its model, and the sub-block of that name."""

    def build(family, name):
        model = make_model(family)
        sites = discover(model, make_batch(family)).sites
        return model, next(site for site in sites if site.name == name)

    return build


class Separable(nn.Module):
    """`[batch, 4, rows, columns]` -> the same: two outputs for each channel in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.expand, self.slope = nn.Conv2d(4, 6, 1), nn.PReLU(6)
        self.middle = nn.Conv2d(6, 12, 3, padding=1, groups=6, bias=False)
        self.norm, self.project = nn.BatchNorm2d(12), nn.Conv2d(12, 4, 1)

    def forward(self, x):
        return x + self.project(torch.relu(self.norm(self.middle(self.slope(self.expand(x))))))


@pytest.fixture
def separable():
    """A model of two separable blocks, and the second one's site."""
    torch.manual_seed(0)
    model = frozen(nn.Sequential(Separable(), Separable()))
    sites = discover(model, torch.randn(2, 4, 5, 5)).sites
    return model, next(site for site in sites if site.name == "1")


def test_narrowed_layers_say_their_own_sizes(separable):
    model, site = separable
    block = narrowed_copy(model, site, [1, 4])
    expand, middle, project = block.expand, block.middle, block.project
    assert (expand.in_channels, expand.out_channels, expand.groups) == (4, 2, 1)
    assert (middle.in_channels, middle.out_channels, middle.groups) == (2, 4, 2)
    assert (project.in_channels, project.out_channels, project.groups) == (4, 4, 1)
    assert (block.slope.num_parameters, block.norm.num_features) == (2, 4)
    assert [tuple(layer.weight.shape) for layer in (expand, middle, project)] == [
        (2, 4, 1, 1),
        (4, 1, 3, 3),
        (4, 4, 1, 1),
    ]


def test_narrowed_linear_layers_say_their_own_sizes(narrowable):
    llama = narrowed_copy(*narrowable("llama", "model.layers.1.mlp"), [3, 5, 8])
    assert (llama.gate_proj.out_features, llama.down_proj.in_features) == (3, 3)
    gpt2 = narrowed_copy(*narrowable("gpt2", "transformer.h.1.mlp"), [3, 5, 8])
    assert (gpt2.c_fc.nx, gpt2.c_fc.nf, gpt2.c_proj.nx, gpt2.c_proj.nf) == (32, 3, 3, 32)
    assert gpt2.c_fc.weight.shape == (32, 3) and gpt2.c_fc.bias.shape == (3,)


def test_vectors_of_units_are_the_entries_of_the_kept_units(separable):
    model, site = separable
    vectors = unit_vectors(model, site.width, [1, 4])
    block, pairs = model[1], [2, 3, 8, 9]
    expected = {
        "1.expand.bias": block.expand.bias[[1, 4]],
        "1.slope.weight": block.slope.weight[[1, 4]],
        "1.norm.weight": block.norm.weight[pairs],
        "1.norm.bias": block.norm.bias[pairs],
        "1.norm.running_mean": block.norm.running_mean[pairs],
        "1.norm.running_var": block.norm.running_var[pairs],
    }
    assert vectors.keys() == expected.keys()
    assert all(torch.equal(vectors[name], expected[name]) for name in expected)


@pytest.mark.parametrize("family, name", CASES)
def test_only_weights_and_vectors_of_units_differ_from_the_dense_state(narrowable, family, name):
    model, site = narrowable(family, name)
    kept = list(range(1, site.width.units))
    dense, narrow = model.get_submodule(name).state_dict(), narrowed_copy(model, site, kept)
    vectors = unit_vectors(model, site.width, kept)
    changed = {c.member.parameter_path for c in site.width.cuts if c.side != "whole"} | {*vectors}
    state = narrow.state_dict()
    assert state.keys() == dense.keys()
    for path, tensor in state.items():
        shared = tensor.data_ptr() == dense[path].data_ptr()
        assert shared == (f"{name}.{path}" not in changed)
        if f"{name}.{path}" in vectors:
            assert torch.equal(tensor, vectors[f"{name}.{path}"])


@pytest.mark.parametrize("family, name", CASES)
def test_narrowed_copy_leaves_the_model_as_it_is(narrowable, make_model, family, name):
    model, site = narrowable(family, name)
    narrowed_copy(model, site, [0])
    dense = make_model(family)
    assert repr(model) == repr(dense)
    state = model.state_dict()
    assert all(torch.equal(state[path], tensor) for path, tensor in dense.state_dict().items())


@pytest.mark.parametrize("family, name", CASES)
def test_copy_that_keeps_all_units_has_the_dense_tensors(narrowable, family, name):
    model, site = narrowable(family, name)
    narrow = narrowed_copy(model, site, range(site.width.units)).state_dict()
    dense = model.get_submodule(name).state_dict()
    assert all(torch.equal(narrow[path], tensor) for path, tensor in dense.items())


@given(
    data=st.data(), units=st.integers(1, 5), features=st.integers(1, 3), stacks=st.integers(1, 3)
)
@settings(max_examples=30, deadline=None)
def test_parts_are_the_places_of_the_kept_units(data, units, features, stacks):
    kept = sorted(data.draw(st.sets(st.integers(0, units - 1), min_size=1)))
    size = units * features * stacks
    matrix = torch.arange(size)[:, None].expand(size, size)
    width = Width("channel", units, ())
    for side, given_matrix in (("out", matrix), ("in", matrix.T), ("whole", matrix)):
        cut = Cut(Member("layer", LayerShape(size, size)), side, features, stacks)
        part = part_of(given_matrix, cut, width, kept)
        of_unit = torch.arange(size).view(stacks, units, features)[:, kept].flatten()
        expected = {
            "out": matrix[of_unit],
            "in": matrix.T[:, of_unit],
            "whole": matrix,
        }[side]
        assert torch.equal(part, expected)
        assert tuple(part.shape) == (
            cut.narrowed(len(kept)).out_features,
            cut.narrowed(len(kept)).in_features,
        )


@pytest.mark.parametrize("family, name", CASES)
def test_moved_width_names_the_like_sub_block(narrowable, family, name):
    _, site = narrowable(family, name)
    below = moved(site.width, name, "")
    assert not any(cut.member.module.startswith(name) for cut in below.cuts)
    assert moved(below, "", name) == site.width
    assert moved(moved(site.width, name, "other.7"), "other.7", name) == site.width


def test_narrowing_needs_a_width(make_model):
    with pytest.raises(ValueError, match="lm_head has no width"):
        narrowed_copy(make_model("llama"), Site("lm_head", "linear"), [0])
