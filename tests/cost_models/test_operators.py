"""Distinct operators, random weights, and what they are called with."""

import pytest
import torch

from apportion.cost_models.operators import (
    Given,
    built_layers,
    candidate_programs,
    copies_of,
    observe,
    original_layers,
    original_operator,
    rotation,
    runs_dense,
)
from apportion.cost_models.random_weights import nonzeros_of, random_stored
from apportion.kernels.formats import LayerShape, stored_bytes
from apportion.kernels.reference import reference_weight
from apportion.spaces.apply import WRITTEN_BACK
from apportion.spaces.compressors.compose import format_of
from apportion.spaces.grammar import parse_option

SHAPE = LayerShape(32, 64)
GIVEN = Given((4, 8, 64), "float32")


def candidates(tiny, space, text: str) -> dict[str, str]:
    site = space.sites[space.weight_sites[0]]
    found = candidate_programs(tiny, site, parse_option(text), [GIVEN], 1, 8)
    return {operator.implementation: operator.key for (operator,) in found}


@pytest.mark.parametrize(
    "text",
    ["bf16", "w8", "w3g64", "w1.58g32", "s60%", "2:4", "r50%", "s50%+w4g32", "w2g64+r4"]
    + ["w3g16+o1%", "s50%+w4+o5%+r4", "w4g32:awq"],
)
def test_random_weights_are_stored_in_the_format(text: str) -> None:
    option = parse_option(text)
    format, nonzeros = format_of(option, SHAPE, "float32"), nonzeros_of(option, SHAPE)
    stored = random_stored(format, SHAPE, 0, nonzeros)
    size = sum(t.numel() * t.element_size() for t in stored.tensors.values())
    assert size == stored_bytes(format, SHAPE, nonzeros)
    assert reference_weight(stored).isfinite().all()


def test_observed_inputs_are_those_of_the_run(tiny, space, sample) -> None:
    seen = observe(tiny, space, lambda: tiny(sample))
    assert seen["blocks.1.mlp.gate"] == Given((4, 8, 64), "float32")
    assert seen["blocks.0.mlp.down"] == Given((4, 8, 128), "float32")


def test_observed_inputs_leave_out_what_is_written_back(memory) -> None:
    model, space = memory
    assert observe(model, space, lambda: model(torch.randn(2, 3, 64))) == {}
    assert {runs_dense(site, "float32") for site in space.sites} == {WRITTEN_BACK}


def test_operators_of_like_sites_are_one(tiny, space) -> None:
    first, second = (space.sites[space.index(f"blocks.{n}.mlp.gate+up")] for n in (0, 1))
    assert original_operator(tiny, first.members, GIVEN, 1).key == (
        original_operator(tiny, second.members, GIVEN, 1).key
    )


def test_operators_that_unpack_do_not_depend_on_the_format(tiny, space) -> None:
    assert (
        candidates(tiny, space, "w4g64")["linear.bf16"]
        == (candidates(tiny, space, "w3g64")["linear.bf16"])
    )
    assert (
        candidates(tiny, space, "r50%")["low_rank.f32"]
        != (candidates(tiny, space, "r25%")["low_rank.f32"])
    )


def test_operator_runs_every_member_on_one_input(tiny, space) -> None:
    site = space.sites[space.index("blocks.0.mlp.gate+up")]
    ((operator,), *_) = candidate_programs(tiny, site, parse_option("bf16"), [GIVEN], 1, 8)
    layers = built_layers(operator, 2, 0)
    assert [layer(torch.randn(GIVEN.shape)).shape for layer in layers[0]] == [(4, 8, 128)] * 2


def test_rotation_takes_the_copies_in_turn(tiny, space) -> None:
    site = space.sites[space.index("blocks.0.mlp.down")]
    given = Given((1, 128), "float32")
    copies = original_layers(tiny, site.members, 3)
    called: list[int] = []
    for number, (layer,) in enumerate(copies):
        layer.register_forward_hook(lambda *_, number=number: called.append(number))
    once = rotation(copies, given)
    for _ in range(4):
        once()
    assert called == [0, 1, 2, 0]


def test_copies_cover_the_footprint(tiny, space) -> None:
    site = space.sites[space.index("blocks.0.mlp.down")]
    operator = original_operator(tiny, site.members, GIVEN, 1)
    assert copies_of(operator, 3.5 * operator.dense_bytes) == 4
    assert copies_of(operator, 0) == 1
