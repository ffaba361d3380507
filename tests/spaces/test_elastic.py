"""Elastic sites: sub-networks over shared weights, their training, what a study makes of them."""

import copy
import itertools
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy, gelu

from apportion import Choice, train_supernet
from apportion.errors import InvalidInput
from apportion.hashing import tensors_hash
from apportion.spaces.apply import apply
from apportion.spaces.batches import call, main_tensor
from apportion.spaces.compressors.restructure import restructure
from apportion.spaces.discovery import discover
from apportion.spaces.elastic import trained_space
from apportion.spaces.grammar import parse_option
from apportion.spaces.subnetworks import Supernet, drawn, extremes

WIDTH, HEADS, FEATURES, INNER, CLASSES = 8, 4, 2, 12, 3
ELASTIC = {
    "attention:*": ("keep", "drop", "c50%:first"),
    "mlp:*": ("keep", "c75%:first", "c50%:first"),
}
LEFT = {"keep": 1, "c75%:first": 0.75, "c50%:first": 0.5, "drop": 0}


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x):
        q, k, v = (f(x).unflatten(-1, (-1, FEATURES)).mT for f in (self.q, self.k, self.v))
        found = torch.einsum("tfh,sfh->hts", q, k).softmax(-1)
        return self.o(torch.einsum("hts,sfh->thf", found, v).flatten(-2))


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)

    def forward(self, x):
        return self.down(gelu(self.up(x)))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention, self.mlp = nn.LayerNorm(WIDTH), Attention(), Mlp()

    def forward(self, x):
        x = x + self.attention(self.norm(x))
        return x + self.mlp(x)


class Net(nn.Module):
    """`[tokens, 8]` -> `[tokens, 3]`."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.between = Choice({"tanh": nn.Tanh(), "linear": nn.Linear(WIDTH, WIDTH)})
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(self.between(x))


def by_hand(net: Net, chosen: dict[str, str], x: torch.Tensor) -> torch.Tensor:
    """What a sub-network gives, from slices of the weights."""
    for number, block in enumerate(net.blocks):
        a, m = block.attention, block.mlp
        heads = round(HEADS * LEFT[chosen[f"blocks.{number}.attention"]])
        normed, rows = block.norm(x), slice(heads * FEATURES)
        if heads:
            parts = []
            for head in range(heads):
                own = slice(head * FEATURES, (head + 1) * FEATURES)
                q, k, v = (normed @ f.weight[own].T + f.bias[own] for f in (a.q, a.k, a.v))
                parts.append((q @ k.T).softmax(-1) @ v)
            x = x + torch.cat(parts, -1) @ a.o.weight[:, rows].T + a.o.bias
        inner = round(INNER * LEFT[chosen[f"blocks.{number}.mlp"]])
        hidden = gelu(x @ m.up.weight[:inner].T + m.up.bias[:inner])
        x = x + hidden @ m.down.weight[:, :inner].T + m.down.bias
    x = net.between.alternatives[chosen["between"].removeprefix("op:")](x)
    return net.head(x)


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The class is the greatest of the first three inputs."""
    x = torch.randn(32, WIDTH)
    return x, x[:, :CLASSES].argmax(-1)


def seeded(make=Net, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return make()


def supernet_of(model: nn.Module, elastic=ELASTIC, sample=None) -> Supernet:
    x = batch(0)[0].to(next(model.parameters()).dtype) if sample is None else sample
    return Supernet(model, trained_space(model.eval(), elastic, lambda: x))


def train(model: nn.Module, folder: Path, **given) -> nn.Module:
    given = {"steps": 12, "save_every": 5, "elastic": ELASTIC} | given
    train_supernet(
        model, given.pop("batches", batch), cross_entropy, checkpoint=folder / "elastic", **given
    )
    return model


def weights_hash(model: nn.Module) -> str:
    return tensors_hash(dict(model.named_parameters()))


@given(seed=st.integers(0, 10**6))
@settings(max_examples=15, deadline=None)
def test_subnetwork_and_its_gradients_are_those_of_the_sliced_weights(seed):
    net = seeded().double()
    twin, supernet = copy.deepcopy(net), supernet_of(net)
    (chosen,) = drawn(supernet.space, 1, random.Random(seed))
    x = torch.randn(5, WIDTH, dtype=torch.float64)
    found, expected = supernet.run(chosen, x), by_hand(twin, chosen, x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    found.square().sum().backward()
    expected.square().sum().backward()
    for name, parameter in twin.named_parameters():
        found_grad = net.get_parameter(name).grad
        assert (found_grad is None) == (parameter.grad is None), name
        if parameter.grad is not None:
            torch.testing.assert_close(found_grad, parameter.grad, rtol=0, atol=1e-12)


def test_one_step_adds_up_the_gradients_of_whole_and_distilled_smallest(tmp_path):
    net = seeded().double()
    twin = copy.deepcopy(net)
    x, labels = torch.randn(6, WIDTH, dtype=torch.float64), torch.tensor([0, 2, 1, 1, 0, 2])
    sites = [f"blocks.{n}.{kind}" for n in range(2) for kind in ("attention", "mlp")]
    whole = by_hand(twin, {**dict.fromkeys(sites, "keep"), "between": "op:linear"}, x)
    least = {name: "drop" if "attention" in name else "c50%:first" for name in sites}
    smallest = by_hand(twin, {**least, "between": "op:tanh"}, x)
    taught = cross_entropy(smallest, whole.detach().softmax(-1)) / 2
    (cross_entropy(whole, labels) + taught + cross_entropy(smallest, labels) / 2).backward()
    torch.optim.AdamW(twin.parameters(), 0.01, weight_decay=0.1).step()

    given = {"steps": 1, "learning_rate": 0.01, "weight_decay": 0.1, "random_subnetworks": 0}
    train(net, tmp_path, batches=lambda step: (x, labels), **given)
    for name, parameter in twin.named_parameters():
        # the gradients of k's biases are 0 but for rounding, which AdamW divides by 1e-8
        torch.testing.assert_close(net.get_parameter(name), parameter, rtol=0, atol=1e-9)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "conv"])
def test_subnetwork_is_what_a_study_evaluates(family, make_model, make_batch, make_plan):
    model, inputs = make_model(family), make_batch(family)
    sites = discover(model, inputs).sites
    elastic = {
        s.name: ("drop", "c75%:first", "c50%:first") if s.width and s.width.units > 3 else ("drop",)
        for s in sites
        if s.is_structure
    }
    supernet = supernet_of(model, elastic, inputs)
    for chosen in drawn(supernet.space, 5, random.Random(0)):
        chosen = supernet.space.canonical(chosen)
        studied = make_model(family)
        plan = make_plan(studied, supernet.space, chosen)
        apply(studied, plan.space, chosen, plan.stored, plan.implementations)
        with torch.no_grad():
            found = main_tensor(supernet.run(chosen, inputs))
            torch.testing.assert_close(found, main_tensor(call(studied, inputs)))


def test_model_is_its_own_after_a_run_that_fails():
    net = seeded()
    supernet = supernet_of(net)
    _, smallest = extremes(supernet)
    modules, before = dict(net.named_modules()), weights_hash(net)
    with pytest.raises(RuntimeError):
        supernet.run(smallest, torch.randn(2, WIDTH + 1))
    assert dict(net.named_modules()) == modules and weights_hash(net) == before


@pytest.fixture(scope="module")
def space():
    """That of `ELASTIC`."""
    return supernet_of(seeded()).space


@given(count=st.integers(1, 9), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_no_option_is_drawn_twice_before_all_came_once(space, count, seed):
    chosen = drawn(space, count, random.Random(seed))
    for site, texts in zip(space.sites, space.texts, strict=True):
        often = [sum(each[site.name] == text for each in chosen) for text in texts]
        assert sum(often) == count and max(often) - min(often) <= 1


def test_first_pattern_that_names_a_site_gives_its_options():
    elastic = {"*.1.mlp": ("c50%:first",), "mlp:*": ("drop",)}
    space = supernet_of(seeded(), elastic).space
    assert dict(zip(space.names, space.texts, strict=True)) == {
        "blocks.0.mlp": ("keep", "drop"),
        "blocks.1.mlp": ("keep", "c50%:first"),
        "between": ("op:tanh", "op:linear"),
    }


def test_every_subnetwork_learns(tmp_path):
    supernet = supernet_of(train(seeded(), tmp_path, steps=200, learning_rate=0.02))
    x, labels = batch(0)
    space = supernet.space
    for texts in itertools.product(*space.texts):
        with torch.no_grad():
            output = supernet.run(dict(zip(space.names, texts, strict=True)), x)
        assert cross_entropy(output, labels) < 0.6


def test_training_that_ends_anywhere_and_goes_on_gives_the_same_weights(tmp_path):
    (tmp_path / "whole").mkdir()
    expected = weights_hash(train(seeded(), tmp_path / "whole", fair_share=0.3))
    for last in (1, 5, 9, 11):
        folder = tmp_path / str(last)
        folder.mkdir()

        def ending(step: int, last: int = last):
            if step == last:
                raise TimeoutError
            return batch(step)

        with pytest.raises(TimeoutError):
            train(seeded(), folder, batches=ending, fair_share=0.3)
        again = seeded(seed=7 if last >= 5 else 0)
        assert weights_hash(train(again, folder, fair_share=0.3)) == expected


PROGRAM = """
import runpy, sys
from pathlib import Path
there = runpy.run_path(sys.argv[1])
model = there["seeded"]()
tell = lambda step, loss: print(step, flush=True)
there["train"](model, Path(sys.argv[2]), steps=40, save_every=3, tell=tell)
print(there["weights_hash"](model))
"""


def test_killed_process_is_continued_to_the_same_bits(tmp_path):
    command = [sys.executable, "-P", "-c", PROGRAM, __file__, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if int(line) == 20:
                process.send_signal(signal.SIGKILL)
                break
    assert process.returncode == -signal.SIGKILL
    continued = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert 19 <= int(continued[0])
    (tmp_path / "elastic").unlink()
    whole = train(seeded(), tmp_path, steps=40, save_every=3)
    assert weights_hash(whole) == continued[-1]


@pytest.mark.parametrize(
    ("before", "now", "told"),
    [
        (ELASTIC, {}, "elastic .* -> none"),
        ({}, ELASTIC, "elastic none -> "),
        (ELASTIC, dict(reversed(ELASTIC.items())), "elastic .* -> "),
    ],
    ids=["elastic-before", "elastic-now", "order"],
)
def test_checkpoint_of_other_elastic_sites_is_refused(before, now, told, tmp_path):
    train(seeded(), tmp_path, elastic=before)
    with pytest.raises(InvalidInput, match=told):
        train(seeded(), tmp_path, elastic=now)


class Joined(Mlp):
    """An MLP whose forward knows its width."""

    def forward(self, x):
        return self.down(gelu(self.up(x)).view(-1, INNER))


def joined() -> nn.Module:
    net = Net()
    for block in net.blocks:
        block.mlp = Joined()
    return net


def blocks() -> nn.Module:
    """Without a choice block."""
    return nn.Sequential(*Net().blocks)


@pytest.mark.parametrize(
    ("make", "elastic", "told"),
    [
        (Net, {"mpl:*": ["drop"]}, r'elastic\[1\].sites: "mpl:\*" matches no site; nearest: "mlp'),
        (Net, {"mlp:*": ["c50%:obs"]}, r'elastic\["mlp:\*"\]: "c50%:obs" .*; here c50%:first'),
        (Net, {"mlp:*": ["c50%"]}, "share the weights .* keep, drop and cP%:first do; here c50%"),
        (Net, {"mlp:*": ["c50%:first+w8"]}, "does not share the weights"),
        (Net, {"attention:*": ["v50%"]}, "share the weights .* keep, drop and cP%:first do$"),
        (Net, {"mlp:*": ["drop:mean"]}, "does not share the weights"),
        (Net, {"attention:*": ["v50%"]}, "does not share .* and cP%:first do$"),
        (Net, {"mlp:*": ["op:tanh"]}, "does not share the weights"),
        (Net, {"mlp:*": ["c5%:first"]}, r'elastic\[1\].*"c5%:first" does not fit 2 sites: .* none'),
        (Net, {"blocks.*.up": ["drop"]}, "names only sites that no option here is for"),
        (Net, {"mlp:*": ["c50"]}, r'elastic\["mlp:\*"\]: option "c50"'),
        (
            joined,
            {"mlp:*": ["c50%:first"]},
            "the width of blocks.0.mlp cannot change: with",
        ),
        (Net, {"block:*": ["c50%:first"]}, "as wide as its sub-blocks"),
        (blocks, {"mlp:*": ["keep"]}, "elastic gives no site a second option"),
    ],
)
def test_what_cannot_be_trained_over_shared_weights_is_refused(make, elastic, told, tmp_path):
    with pytest.raises(InvalidInput, match=told):
        train(seeded(make), tmp_path, elastic=elastic)


@pytest.fixture(scope="module")
def mlp_width():
    """That of an MLP with paths `blocks.0.mlp.up` and `.down`."""
    sites = discover(seeded().eval(), batch(0)[0]).sites
    return next(site.width for site in sites if site.name == "blocks.0.mlp")


@given(seed=st.integers(0, 99), percent=st.integers(9, 99))
@settings(max_examples=20, deadline=None)
def test_first_units_stay_as_they_are_whatever_enters_them(mlp_width, seed, percent):
    generator = torch.Generator().manual_seed(seed)
    up = torch.randn(INNER, WIDTH, generator=generator)
    down = torch.randn(WIDTH, INNER, generator=generator)
    x = torch.randn(40, INNER, generator=generator, dtype=torch.float64)
    option = parse_option(f"c{percent}%:first")
    found = restructure(mlp_width, (up, down), (None, x.T @ x), option.keep_percent, "first")
    kept = percent * INNER // 100
    assert found.kept == tuple(range(kept)) and not option.needs_statistics
    assert torch.equal(found.weights[0], up[:kept])
    assert torch.equal(found.weights[1], down[:, :kept])


def test_first_does_not_say_which_experts_go(make_model, make_batch):
    model, inputs = make_model("mixtral"), make_batch("mixtral")
    with pytest.raises(InvalidInput, match="first does not say which experts go; drop, merge"):
        supernet_of(model, {"mlp:*": ["c50%:first"]}, inputs)
