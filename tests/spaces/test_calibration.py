"""Calibration: second moments equal a float64 oracle, and bad data are refused."""

import pytest
import torch
from torch import nn

from apportion.errors import InvalidInput
from apportion.spaces.batches import frozen
from apportion.spaces.calibration import collect
from apportion.spaces.discovery import discover
from apportion.spaces.entries import Entry, build_space


def watched(model, batches, pattern="*"):
    space = build_space(discover(model, batches[0]).sites, [Entry((pattern,), ("w8",))])
    return collect(model, space.sites, batches)


def oracle(rows):
    rows = rows.double()
    return rows.T @ rows


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(3, 4, 7, 6, generator=generator) for _ in range(3)]


def test_collect_sums_second_moments_over_all_batches():
    model = frozen(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 5)))
    batches = [torch.randn(2, tokens, 6) for tokens in (3, 7, 4)]
    found = watched(model, batches)
    rows = torch.cat([batch.reshape(-1, 6) for batch in batches])
    torch.testing.assert_close(found["0"].second_moment, oracle(rows), rtol=1e-5, atol=1e-5)
    inner = oracle(model[0](rows))
    torch.testing.assert_close(found["1"].second_moment, inner, rtol=1e-5, atol=1e-5)
    assert found["0"].tokens == found["1"].tokens == 2 * (3 + 7 + 4)
    assert torch.equal(found["0"].peak, rows.abs().amax(0))
    torch.testing.assert_close(found["1"].peak, model[0](rows).abs().amax(0))
    assert found["0"].second_moment.dtype == torch.float64


def test_collect_does_not_lose_small_batches_after_large_ones():
    model = frozen(nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1)))
    batches = [torch.full((1, 1), 1e4), *[torch.ones(1, 1)] * 8]
    # In float32 a sum of 1e8 does not notice a one.
    assert watched(model, batches)["0"].second_moment.item() == 1e8 + 8


def test_collect_gives_a_group_one_moment(make_model, make_batch):
    model, batch = make_model("llama"), make_batch("llama")
    name = "model.layers.0.self_attn.q_proj+k_proj+v_proj"
    found = watched(model, [batch, batch])
    hidden = model.model.layers[0].input_layernorm(model.model.embed_tokens(batch["input_ids"]))
    expected = 2 * oracle(hidden.reshape(-1, hidden.shape[-1]))
    torch.testing.assert_close(found[name].second_moment, expected, rtol=1e-5, atol=1e-5)
    assert len([site for site in found if "q_proj" in site]) == 3


@pytest.mark.parametrize(
    "settings",
    [
        dict(kernel_size=3),
        dict(kernel_size=(3, 2), stride=(2, 1), padding=(1, 0)),
        dict(kernel_size=2, dilation=(2, 3), padding=2),
        dict(kernel_size=1, stride=2),
    ],
)
def test_collect_of_a_convolution_watches_its_patches(images, settings):
    model = frozen(nn.Sequential(nn.Conv2d(4, 5, **settings), nn.ReLU()))
    found = watched(model, images)["0"]
    weight = model[0].weight.reshape(5, -1).double()
    outputs = torch.cat([model[0](x) for x in images]).double() - model[0].bias[:, None, None]
    # The outputs' energy is the weights' quadratic form with the second moment of the inputs.
    energy = torch.einsum("oi,ij,oj->o", weight, found.second_moment, weight)
    torch.testing.assert_close(energy, outputs.square().sum((0, 2, 3)), rtol=1e-4, atol=1e-4)
    assert found.tokens == outputs[:, 0].numel()


def test_collect_of_a_pointwise_convolution_equals_the_oracle(images):
    model = frozen(nn.Sequential(nn.Conv2d(4, 5, 1), nn.ReLU(), nn.Conv2d(5, 2, 1)))
    rows = torch.cat([x.permute(0, 2, 3, 1).reshape(-1, 4) for x in images])
    moment = watched(model, images)["0"].second_moment
    torch.testing.assert_close(moment, oracle(rows), rtol=1e-5, atol=1e-5)
    assert torch.equal(watched(model, images)["0"].peak, rows.abs().amax(0))


def test_collect_leaves_grouped_convolutions_out(make_model, make_batch):
    found = watched(make_model("conv"), [make_batch("conv")])
    assert "blocks.1.first" not in found and "blocks.1.second" in found


def test_collect_leaves_out_what_nobody_sees(make_model, make_batch):
    found = watched(make_model("recurrent"), [make_batch("recurrent")])
    assert [*found] == ["memory.weight_ih_l0", "memory.weight_ih_l0_reverse", "head"]


def test_collect_has_statistics_of_each_expert(make_model, make_batch):
    found = watched(make_model("mixtral"), [make_batch("mixtral")])
    layers = [f"model.layers.{n}.mlp.experts." for n in (0, 1)]
    leaves = [f"{leaf}.{place}" for leaf in ("gate_up_proj", "down_proj") for place in range(4)]
    expected = [layer + leaf for layer in layers for leaf in leaves]
    assert [name for name in found if "experts" in name] == expected


def test_collect_of_a_bfloat16_model_sums_in_float64():
    model = frozen(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).bfloat16())
    batch = torch.randn(300, 4).bfloat16()
    moment = watched(model, [batch])["0"].second_moment
    torch.testing.assert_close(moment, oracle(batch), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_collect_of_inputs_that_are_not_finite_names_the_site(bad):
    model = frozen(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)))
    good, broken = torch.ones(2, 3), torch.ones(2, 3)
    broken[1, 2] = bad
    with pytest.raises(InvalidInput, match="the inputs of site 0 are not finite"):
        watched(model, [good, broken])


def test_collect_without_data_says_so(make_model, full_space):
    with pytest.raises(InvalidInput, match=r"data\.calibration: there is no calibration data"):
        collect(make_model("conv"), full_space("conv").sites, [])


def test_collect_tells_progress_and_leaves_no_hooks(make_model, full_space, make_batch):
    model, told = make_model("conv"), []
    collect(model, full_space("conv").sites, [make_batch("conv")] * 3, told.append)
    with pytest.raises(RuntimeError):
        collect(model, full_space("conv").sites, [torch.zeros(1, 1, 1, 1)])
    assert told == [1, 2, 3]
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_collect_adds_exact_products_of_wide_layers():
    model = frozen(nn.Sequential(nn.Linear(600, 3), nn.Linear(3, 2)))
    first, second = torch.randn(7, 600), torch.randn(5, 600)
    expected = (first.T @ first).double() + (second.T @ second).double()
    assert torch.equal(watched(model, [first, second])["0"].second_moment, expected)
