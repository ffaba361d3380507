"""Elastic kernels: what a smaller one computes, learns, weighs and leaves in an exported folder."""

import copy
import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import conv2d, cross_entropy

import apportion
from apportion import Choice, elastic_kernel, sort_units, train_supernet
from apportion.cost_models.static import resident_cost, weight_bytes
from apportion.errors import InvalidInput
from apportion.hashing import content_hash, tensors_hash
from apportion.spaces.artifact import TENSORS, write
from apportion.spaces.batches import frozen
from apportion.spaces.choice import find_choices
from apportion.spaces.discovery import discover
from apportion.spaces.elastic import trained_space
from apportion.spaces.entries import Entry, build_space
from apportion.spaces.kernel_sizes import CenterKernel, make_kernels_plain, plain_parameters
from apportion.spaces.narrowing import shared_copy
from apportion.spaces.subnetworks import Supernet, extremes
from apportion.workers.sources import open_model
from apportion.workers.user_code import load_function

CHANNELS, CLASSES = 4, 3
SIZES = (7, 5, 3)
ENTRIES = [
    Entry(("shrink",), ("op:k7", "op:k5")),
    Entry(("choice:*",), ("op:k7", "op:k5", "op:k3")),
    Entry(("block:*",), ("keep", "drop")),
    Entry(("mlp:*",), ("keep", "c50%:first")),
]


def depthwise(stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(CHANNELS, CHANNELS, 7, stride, padding=3, groups=CHANNELS)


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Conv2d(CHANNELS, 8, 1), nn.Conv2d(8, CHANNELS, 1)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.spatial, self.mlp = elastic_kernel(depthwise(), SIZES), Mlp()

    def forward(self, x):
        return x + self.mlp(torch.relu(self.spatial(x)))


class Net(nn.Module):
    """`[n, 1, 8, 8]` -> `[n, 3]`."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, CHANNELS, 1)
        self.shrink = elastic_kernel(depthwise(stride=2), SIZES[:2])
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(CHANNELS, CLASSES)

    def forward(self, x):
        x = self.shrink(self.stem(x))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


def perturbed(model: nn.Module) -> nn.Module:
    """The matrices away from the identity, as training leaves them."""
    draw = torch.Generator().manual_seed(3)
    for module in model.modules():
        if isinstance(module, CenterKernel):
            noise = torch.randn(module.transform.shape, generator=draw)
            module.transform.data += 0.1 * noise.to(module.transform)
    return model


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return perturbed(Net())


@pytest.fixture
def sample() -> torch.Tensor:
    return torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The class is the row of the three that is brightest."""
    x = torch.randn(16, 1, 8, 8)
    return x, x[:, 0, :CLASSES].sum(-1).argmax(-1)


def by_hand(block: Choice, size: int) -> torch.Tensor:
    """A smaller kernel, entry by entry: each is a sum over the center of the next larger one."""
    kernel = block.alternatives["k7"].weight
    for smaller in (each for each in SIZES[1:] if each >= size):
        margin = (kernel.shape[-1] - smaller) // 2
        matrix = block.alternatives[f"k{smaller}"].transform
        matrix = matrix.unflatten(0, (smaller, smaller)).unflatten(-1, (smaller, smaller))
        center = kernel[:, :, margin : margin + smaller, margin : margin + smaller]
        kernel = torch.einsum("hwyx,oiyx->oihw", matrix, center)
    return kernel


@pytest.mark.parametrize("size", [5, 3])
def test_smaller_kernel_is_the_transformed_center_of_the_larger(size):
    torch.manual_seed(0)
    block = perturbed(elastic_kernel(depthwise(stride=2), SIZES)).double()
    x = torch.randn(2, CHANNELS, 9, 9, dtype=torch.float64)
    bias = block.alternatives["k7"].bias
    block.select(f"k{size}")
    expected = conv2d(x, by_hand(block, size), bias, 2, size // 2, groups=CHANNELS)
    torch.testing.assert_close(block(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [5, 3])
def test_gradients_reach_the_shared_weight_and_the_matrices(size):
    torch.manual_seed(0)
    block = perturbed(elastic_kernel(depthwise(), SIZES)).double()
    x = torch.randn(1, CHANNELS, 9, 9, dtype=torch.float64)
    used = [n for n, _ in block.named_parameters() if "k3" not in n or size == 3]
    weights = [block.get_parameter(name) for name in used]
    bias = block.alternatives["k7"].bias
    block.select(f"k{size}")
    found = torch.autograd.grad(block(x).square().sum(), weights)
    plain = conv2d(x, by_hand(block, size), bias, padding=size // 2, groups=CHANNELS)
    expected = torch.autograd.grad(plain.square().sum(), weights)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    whole = found[used.index("alternatives.k7.weight")]
    assert whole[..., 1:-1, 1:-1].all() and whole.count_nonzero() == CHANNELS * 25


def test_block_holds_each_weight_once_and_its_first_alternative_is_the_convolution():
    conv = depthwise()
    block = elastic_kernel(conv, SIZES)
    assert block.names == ("k7", "k5", "k3") and block.alternatives["k7"] is conv
    assert {n: tuple(t.shape) for n, t in block.state_dict().items()} == {
        "alternatives.k7.weight": (CHANNELS, 1, 7, 7),
        "alternatives.k7.bias": (CHANNELS,),
        "alternatives.k5.transform": (25, 25),
        "alternatives.k3.transform": (9, 9),
    }


@st.composite
def blocks(draw) -> tuple[Choice, torch.Tensor]:
    """A block that may have any geometry that is taken, and an input."""
    sizes = draw(st.sets(st.sampled_from([1, 3, 5, 7]), min_size=2).map(sorted))[::-1]
    groups, dilation = draw(st.sampled_from([1, 2, 4])), draw(st.integers(1, 2))
    least = dilation * (sizes[0] - sizes[-1]) // 2
    stride = draw(st.integers(1, 2))
    paddings = st.integers(least, least + 1) | st.just("same" if stride == 1 else least)
    torch.manual_seed(draw(st.integers(0, 9)))
    conv = nn.Conv2d(
        4, 8, sizes[0], stride, draw(paddings), dilation, groups, bias=draw(st.booleans())
    )
    side = dilation * (sizes[0] - 1) + draw(st.integers(1, 4))
    return perturbed(elastic_kernel(conv, sizes)), torch.randn(2, 4, side, side)


@settings(max_examples=60, deadline=None)
@given(drawn=blocks())
def test_plain_convolutions_give_the_same_to_the_bit_and_maps_of_one_shape(drawn):
    block, x = drawn
    plain = make_kernels_plain(shared_copy(block))
    whole = block(x)
    for name in block.names:
        block.select(name)
        found = plain.alternatives[name]
        assert type(found) is nn.Conv2d
        assert torch.equal(found(x), block(x)) and found(x).shape == whole.shape
        size = sum(parameter.numel() for parameter in found.parameters())
        assert size == plain_parameters(block.alternatives[name])
        assert all(p.is_contiguous() for p in found.parameters())


def test_copies_have_their_own_weights(net, sample):
    copied = copy.deepcopy(net)
    copied.shrink.alternatives["k7"].weight.data.zero_()
    for each in (net, copied):
        each.shrink.select("k5")
        assert bool(each.shrink(each.stem(sample)).std(dim=(0, 2, 3)).any()) is (each is net)


def conv(*args, **keywords) -> nn.Conv2d:
    return nn.Conv2d(CHANNELS, CHANNELS, *args, **keywords)


@pytest.mark.parametrize(
    ("layer", "sizes", "told"),
    [
        (nn.Conv1d(1, 1, 7, padding=3), SIZES, "takes an nn.Conv2d .* not Conv1d"),
        (conv(7, padding=3, padding_mode="reflect"), SIZES, 'padding_mode "reflect"'),
        (conv((7, 5), padding=3), SIZES, "not one of 7 x 5"),
        (conv(5, padding=2), SIZES, r"sizes of elastic_kernel are \(7, 5, 3\); they begin .* 5"),
        (conv(5, padding=2), (5,), r"are \(5\); they begin with the kernel's own, 5, and then"),
        (conv(7, padding=3), (7, 3, 5), "each is smaller than the one before"),
        (conv(7, padding=3), (7, 5, 5), "each is smaller than the one before"),
        (conv(7, padding=3), (7, 4), "4 is no odd number above 0"),
        (conv(6, padding=3), (6, 3), "6 is no odd number above 0"),
        (conv(7, padding=3), (7, -1), "-1 is no odd number above 0"),
        (conv(7, padding=1), SIZES, r"padding \(1, 1\) .* from 7 to 3: .* at least \(2, 2\)"),
        (conv(7, padding=(9, 3), dilation=2), SIZES, r"at least \(4, 4\)"),
        (conv(7, padding="valid"), SIZES, "padding valid .* cannot shrink"),
    ],
)
def test_what_cannot_be_elastic_is_refused(layer, sizes, told):
    with pytest.raises(InvalidInput, match=told):
        elastic_kernel(layer, sizes)


@pytest.mark.parametrize("prepare", [lambda model: model, make_kernels_plain])
def test_discover_finds_the_blocks_and_says_why_their_layers_are_no_sites(net, sample, prepare):
    found = discover(prepare(frozen(net)), sample)
    assert [(s.name, s.choices) for s in found.sites if s.kind == "choice"] == [
        ("shrink", ("k7", "k5")),
        ("blocks.0.spatial", ("k7", "k5", "k3")),
        ("blocks.1.spatial", ("k7", "k5", "k3")),
    ]
    inside = {path: why for path, why in found.untreated.items() if ".alternatives." in path}
    assert "shrink.alternatives.k7" in inside
    assert all("lies in a choice block" in why for why in inside.values())


CONFIGURATIONS = [
    {},
    {"shrink": "op:k5"},
    {"blocks.0.spatial": "op:k5", "blocks.1.spatial": "op:k3"},
    {"shrink": "op:k5", "blocks.0": "drop", "blocks.1.spatial": "op:k5"},
    {"blocks.0.spatial": "op:k3", "blocks.0.mlp": "c50%:first", "blocks.1.mlp": "c50%:first"},
]


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_artifact_holds_plain_kernels_gives_the_trained_output_and_has_the_priced_bytes(
    net, sample, make_plan, tmp_path, configuration
):
    opened = make_kernels_plain(frozen(copy.deepcopy(net)))
    space = build_space(discover(opened, sample).sites, ENTRIES)
    plan = make_plan(opened, space, configuration)
    source = {"kind": "python", "source": "there", "revision": "1", "dtype": "float32"}
    write(tmp_path / "artifact", opened, plan, source, {})
    tensors = load_file(tmp_path / "artifact" / TENSORS)

    config, cost = space.config(configuration), weight_bytes(opened, space)
    rows = [cost.rows[s, o] for s, o in enumerate(config) if not space.void(config, s)]
    assert sum(tensor.nbytes for tensor in tensors.values()) == cost.base + sum(rows)
    chosen = space.canonical(configuration)["shrink"].removeprefix("op:")
    kernels = {n: tuple(t.shape) for n, t in tensors.items() if n.startswith("shrink.")}
    size = int(chosen.removeprefix("k"))
    assert kernels == {
        f"shrink.alternatives.{chosen}.weight": (CHANNELS, 1, size, size),
        f"shrink.alternatives.{chosen}.bias": (CHANNELS,),
    }

    loaded = apportion.load(tmp_path / "artifact", model=Net)
    options = {"block:*": ("keep", "drop"), "mlp:*": ("keep", "c50%:first")}
    supernet = Supernet(net, trained_space(net.eval(), options, lambda: sample))
    with torch.no_grad():
        assert torch.equal(loaded(sample), supernet.run(space.canonical(configuration), sample))


def test_alternatives_weigh_what_plain_convolutions_of_their_sizes_weigh(net, sample):
    opened = make_kernels_plain(frozen(net))
    space = build_space(discover(opened, sample).sites, ENTRIES[:2])
    stored, held = weight_bytes(opened, space), resident_cost(opened, space, {})
    priced = [4 * CHANNELS * (size**2 + 1) for size in SIZES]
    place = space.index("blocks.0.spatial")
    assert stored.rows[place].tolist() == held.rows[place].tolist() == priced
    assert stored.rows[space.index("shrink")].tolist()[:2] == priced[:2]


def test_block_that_no_entry_names_is_stored_with_all_its_kernels(net, sample, make_plan, tmp_path):
    opened = make_kernels_plain(frozen(copy.deepcopy(net)))
    space = build_space(discover(opened, sample).sites, ENTRIES[:1])
    plan = make_plan(opened, space, {"shrink": "op:k5"})
    source = {"kind": "python", "source": "there", "revision": "1", "dtype": "float32"}
    write(tmp_path / "artifact", opened, plan, source, {})
    loaded = apportion.load(tmp_path / "artifact", model=Net)
    net.shrink.select("k5")
    for block, other in zip(loaded.blocks, net.blocks, strict=True):
        block.spatial.select("k3")
        other.spatial.select("k3")
    with torch.no_grad():
        assert torch.equal(loaded(sample), net(sample))


def test_largest_and_smallest_are_told_by_kernels_and_not_by_matrices():
    # the matrices of so few channels have more parameters than the convolution
    model = nn.Sequential(nn.Conv2d(1, CHANNELS, 1), elastic_kernel(depthwise(), SIZES))
    supernet = Supernet(model, trained_space(model, {}, lambda: pytest.fail("asked")))
    largest, smallest = extremes(supernet)
    assert (largest, smallest) == ({"1": "op:k7"}, {"1": "op:k3"})


def test_sizes_are_drawn_and_all_that_is_shared_is_trained(tmp_path):
    torch.manual_seed(0)
    model, seen = Net(), set()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.head.register_forward_hook(lambda *_: seen.add(model.blocks[0].spatial.active))
    train_supernet(model, batch, cross_entropy, checkpoint=tmp_path / "net", steps=4)
    assert seen == {"k7", "k5", "k3"}
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert model.blocks[0].spatial.active == "k7"


def test_interrupted_training_ends_in_the_same_bits(tmp_path):
    def train(name: str, stop: int | None = None) -> str:
        torch.manual_seed(0)
        model = Net()

        def tell(step: int, loss: float) -> None:
            if step == stop:
                raise KeyboardInterrupt

        told = {"checkpoint": tmp_path / name, "steps": 8, "save_every": 3, "tell": tell}
        try:
            train_supernet(model, batch, cross_entropy, elastic={"block:*": ["drop"]}, **told)
        except KeyboardInterrupt:
            return "interrupted"
        return tensors_hash(dict(model.named_parameters()))

    assert train("one", stop=5) == "interrupted"
    assert train("one") == train("other")


def test_sort_units_orders_channels_beside_elastic_kernels_and_leaves_these(net, sample):
    frozen(net)
    before = copy.deepcopy(net)
    sort_units(net, sample, ["mlp:*"])
    assert not torch.equal(net.blocks[0].mlp.up.weight, before.blocks[0].mlp.up.weight)
    for names in itertools.product(("k7", "k5"), SIZES):
        for each in (net, before):
            each.shrink.select(names[0])
            each.blocks[1].spatial.select(f"k{names[1]}")
        torch.testing.assert_close(net(sample), before(sample))
    kernels = [name for name, _ in net.named_parameters() if ".alternatives." in name]
    assert all(torch.equal(net.get_parameter(n), before.get_parameter(n)) for n in kernels)


def test_shared_weights_are_no_reason_against_the_block(net):
    untreated: dict[str, str] = {}
    found = [path for path, _ in find_choices(net, untreated)]
    assert found == ["shrink", "blocks.0.spatial", "blocks.1.spatial"] and not untreated


def test_model_file_is_known_by_what_is_trained_and_opened_with_plain_kernels(tmp_path: Path):
    code = """
    import torch
    from torch import nn
    import apportion


    def build():
        conv = nn.Conv2d(2, 2, 5, padding=2)
        return nn.Sequential(nn.Conv2d(1, 2, 1), apportion.elastic_kernel(conv, (5, 3)))


    def turned():
        model = build()
        model[1].alternatives["k3"].transform.data.neg_()
        return model
    """
    (tmp_path / "model.py").write_text("\n".join(line[4:] for line in code.splitlines()))
    one = open_model("python:model.py:build", "bfloat16", tmp_path)
    other = open_model("python:model.py:turned", "bfloat16", tmp_path)
    torch.manual_seed(0)
    function = load_function("python:model.py:build", tmp_path, "model.source")
    given = tensors_hash(dict(function().bfloat16().state_dict()))
    assert one.revision == content_hash([function.hash, given])
    kernels = [each.model.get_parameter("1.alternatives.k3.weight") for each in (one, other)]
    assert kernels[0].dtype == torch.bfloat16 and not kernels[0].requires_grad
    assert torch.equal(kernels[0], -kernels[1])
