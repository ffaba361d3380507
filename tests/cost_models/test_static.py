"""Static costs against the bytes of files that are really written."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.torch import save_file

from apportion.cost_models.random_weights import random_weights
from apportion.cost_models.rows import shape_of
from apportion.cost_models.static import bits, resident_cost, struck, weight_bytes
from apportion.kernels.group import resident_bytes
from apportion.spaces.artifact import Plan, contents
from apportion.spaces.discovery import discover
from apportion.spaces.entries import Entry, build_space
from apportion.spaces.space import DENSE


def payload(path: Path) -> int:
    """Bytes of all tensors of a safetensors file."""
    with safe_open(path, "pt") as file:
        tensors = [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118
    return sum(t.numel() * t.element_size() for t in tensors)


def configurations(space) -> list[dict[str, str]]:
    names = [site.name for site in space.sites if not site.is_structure]
    structures = [site.name for site in space.sites if site.is_structure]
    uniform = [dict.fromkeys(names, text) for text in space.texts[space.index(names[0])]]
    return [*uniform, *({name: "drop"} for name in structures), {structures[0]: "drop",
            names[-1]: "w3g32+r4"}]  # fmt: skip


def test_weight_bytes_equal_the_written_file(tiny, space, tmp_path: Path) -> None:
    cost, shape = weight_bytes(tiny, space), shape_of(space)
    stored = random_weights(space, "float32", 8)
    for number, configuration in enumerate(configurations(space)):
        plan = Plan(space, space.canonical(configuration), stored, AnyImplementation())
        save_file(contents(tiny, plan)[0], tmp_path / f"{number}.safetensors")
        predicted = cost.base + shape.total(cost.rows, space.config(configuration))
        assert predicted == payload(tmp_path / f"{number}.safetensors"), configuration


def test_bytes_of_a_drop_for_a_constant_are_those_of_the_constant(
    tiny, sample, tmp_path: Path
) -> None:
    entries = [Entry(("block:*", "mlp:*"), ("keep", "drop", "drop:mean"))]
    space = build_space(discover(tiny, sample).sites, entries)
    cost, shape = weight_bytes(tiny, space), shape_of(space)
    stored = random_weights(space, "float32", 8)
    for site in space.sites:
        chosen = space.canonical({site.name: "drop:mean"})
        save_file(contents(tiny, Plan(space, chosen, stored, {}))[0], tmp_path / site.name)
        assert cost.base + shape.total(cost.rows, space.config(chosen)) == payload(
            tmp_path / site.name
        )
    assert (cost.rows[:, 2] == 64 * 4).all() and (cost.rows[:, 1] == 0).all()
    assert (resident_cost(tiny, space, {}).rows[:, 2] == 64 * 4).all()


def test_weight_bytes_of_a_recurrent_layer_equal_the_written_file(memory, tmp_path: Path) -> None:
    model, space = memory
    cost, shape = weight_bytes(model, space), shape_of(space)
    stored = random_weights(space, "float32", 8)
    for number, text in enumerate(("dense", "w4g32", "s60%")):
        chosen = space.canonical({site.name: text for site in space.sites})
        save_file(
            contents(model, Plan(space, chosen, stored, {}))[0], tmp_path / f"{number}.safetensors"
        )
        predicted = cost.base + shape.total(cost.rows, space.config(chosen))
        assert predicted == payload(tmp_path / f"{number}.safetensors")


def test_resident_bytes_of_what_is_written_back_are_dense(memory) -> None:
    model, space = memory
    cost = resident_cost(model, space, {})
    assert (cost.rows == cost.rows[:, :1]).all()
    assert cost.base + cost.rows[:, 0].sum() == resident_bytes(model)


class AnyImplementation(dict):
    """The files do not depend on who runs them."""

    def __missing__(self, key: str) -> "AnyImplementation | str":
        return self if "." in key else "linear.f32"


def test_bits_are_the_mean_of_stored_bits(tiny, space) -> None:
    cost, shape = bits(tiny, space), shape_of(space)
    assert shape.total(cost.rows, (0,) * len(space.sites)) == pytest.approx(32)
    names = [site.name for site in space.sites if not site.is_structure]
    config = space.config(dict.fromkeys(names, "w4g64"))
    assert shape.total(cost.rows, config) == pytest.approx(4 + 32 / 64)


def test_bits_dropped_sites_count_as_nothing(tiny, space) -> None:
    cost, shape = bits(tiny, space), shape_of(space)
    config = space.config({"blocks.0": "drop"})
    assert shape.total(cost.rows, config) == pytest.approx(16)


def test_resident_bytes_of_dense_are_those_of_the_model(tiny, space) -> None:
    names = {s.name: dict.fromkeys(space.texts[i], "linear.f32") for i, s in enumerate(space.sites)}
    for options in names.values():
        options |= {"w8a8": "int8.onednn", "bf16": "linear.bf16"}
    cost, shape = resident_cost(tiny, space, names), shape_of(space)
    dense = cost.base + shape.total(cost.rows, (0,) * len(space.sites))
    assert dense == resident_bytes(tiny)
    site = space.weight_sites[0]
    halved = space.texts[site].index("bf16")
    assert cost.rows[site, halved] == cost.rows[site, 0] / 2


def test_struck_options_are_neither_smaller_nor_faster(tiny, space) -> None:
    cost = weight_bytes(tiny, space)
    rows = cost.rows.copy()
    site = space.weight_sites[0]
    rows[site, 2] = rows[site, 0]
    larger = type(cost)(rows, cost.base)
    assert struck(space, larger, []) == {space.sites[site].name: [space.texts[site][2]]}
    assert (
        DENSE not in struck(space, type(cost)(np.ones_like(rows), 0.0), [])[space.sites[site].name]
    )


@pytest.fixture
def narrow(tiny, sample):
    """A space of nothing but treatments: no weight below them is a site."""
    entries = [Entry(("mlp:*",), ("keep", "c50%", "c25%+w4g32"))]
    return build_space(discover(tiny, sample).sites, entries)


def test_weight_bytes_of_treatments_alone_equal_the_written_file(
    tiny, narrow, tmp_path: Path
) -> None:
    cost, shape = weight_bytes(tiny, narrow), shape_of(narrow)
    stored = random_weights(narrow, "float32", 8)
    for number, texts in enumerate(itertools.product(*narrow.texts)):
        chosen = dict(zip(narrow.names, texts, strict=True))
        plan = Plan(narrow, narrow.canonical(chosen), stored, AnyImplementation())
        save_file(contents(tiny, plan)[0], tmp_path / f"{number}.safetensors")
        predicted = cost.base + shape.total(cost.rows, narrow.config(chosen))
        assert predicted == payload(tmp_path / f"{number}.safetensors"), chosen


def test_bits_of_treatments_alone_are_per_dense_weight(tiny, narrow) -> None:
    rows, blocks = bits(tiny, narrow).rows, len(narrow.sites)
    np.testing.assert_allclose(rows * blocks, [[32, 16, (4 + 32 / 32) / 4]] * blocks)


def test_treatments_are_struck_where_they_beat_nothing_of_what_lies_below(tiny, sample) -> None:
    entries = [Entry(("*",), ("dense", "w8")), Entry(("mlp:*",), ("keep", "c50%", "c75%+s20%"))]
    space = build_space(discover(tiny, sample).sites, entries)
    place, cost = space.index("blocks.0.mlp"), weight_bytes(tiny, space)
    assert "blocks.0.mlp" not in struck(space, cost, [])
    below = [p for p, above in enumerate(space.parent) if above == place]
    dense = cost.rows[place, 0] + sum(cost.rows[p, 0] for p in below)
    rows = cost.rows.copy()
    rows[place, 1] = dense
    assert struck(space, type(cost)(rows, cost.base), [])["blocks.0.mlp"] == ["c50%"]
    rows[place, 1] = dense - 1
    assert "blocks.0.mlp" not in struck(space, type(cost)(rows, cost.base), [])


def test_weight_bytes_of_a_fixed_activation_scale_equal_the_written_file(
    tiny, sample, tmp_path: Path
) -> None:
    entries = [Entry(("linear:blocks.*",), ("w8a8", "w8a8s"))]
    space = build_space(discover(tiny, sample).sites, entries)
    cost, shape = weight_bytes(tiny, space), shape_of(space)
    stored, predicted = random_weights(space, "float32", 8), []
    for text in ("w8a8", "w8a8s"):
        chosen = space.canonical({site.name: text for site in space.sites})
        plan = Plan(space, chosen, stored, AnyImplementation())
        save_file(contents(tiny, plan)[0], tmp_path / text)
        predicted.append(cost.base + shape.total(cost.rows, space.config(chosen)))
        assert predicted[-1] == payload(tmp_path / text)
    members = sum(len(site.members) for site in space.sites)
    assert predicted[1] - predicted[0] == 4 * members
