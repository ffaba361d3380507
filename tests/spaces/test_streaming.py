"""Streaming calibration: the bits of an ordinary pass, with one block's statistics at a time."""

import weakref

import pytest
import torch
from torch import nn

from apportion.errors import InvalidInput
from apportion.spaces.activations import Activations
from apportion.spaces.batches import frozen
from apportion.spaces.calibration import collect
from apportion.spaces.discovery import discover
from apportion.spaces.streaming import portions, stream

WIDTH = 16


class Attention(nn.Module):
    """Rows attend to each other; images' patches and tokens alike."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x):
        scores = self.q(x) @ self.k(x).transpose(-1, -2)
        return self.o(torch.softmax(scores / WIDTH**0.5, -1) @ self.v(x))


class Block(nn.Module):
    """Attention and an MLP; gives a tuple, as older transformers do."""

    def __init__(self):
        super().__init__()
        self.attention = Attention()
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)
        )

    def forward(self, x, shift=0.0):
        x = x + self.attention(x) + shift
        # In place, as models do with activations that nobody else should need.
        x += self.mlp(x)
        return x, None


class Vision(nn.Module):
    """Images `[batch, 3, 8, 8]` in patches of 2 x 2 -> scores `[batch, 5]`."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 2, stride=2)
        self.place = nn.Parameter(torch.randn(16, WIDTH))
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 5)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2) + self.place
        for block in self.blocks:
            x = block(x)[0]
        return self.head(self.norm(x).mean(1))


class Skipping(Vision):
    """The last block is given what the first one gave, too."""

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        first = self.blocks[0](x)[0].clone()
        x = self.blocks[1](first.clone())[0]
        return self.head(self.blocks[2](x + first)[0].mean(1))


class Shifted(Vision):
    """Each block is given another extra tensor, which depends on the images alone."""

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        for place, (block, shift) in enumerate(zip(self.blocks, x.clone().unbind(1), strict=False)):
            x = block(x, place * shift[:, None])[0]
        return self.head(x.mean(1))


class Exiting(Vision):
    """Dark images leave before the last block."""

    def forward(self, x):
        dark = x.mean() < -1
        x = self.patches(x).flatten(2).transpose(1, 2)
        for block in self.blocks[:2] if dark else self.blocks:
            x = block(x)[0]
        return self.head(x.mean(1))


class Expert(Block):
    """Attention of torch's own, which has a fast way, and two experts in a stack."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.experts = nn.Parameter(torch.randn(2, WIDTH, WIDTH) / WIDTH)

    def forward(self, x):
        x = x + self.attention(x, x, x, need_weights=False)[0]
        chosen = (x[..., 0] > 0).long()
        mixed = torch.stack([x @ expert for expert in self.experts], -1)
        return x + mixed.gather(-1, chosen[..., None, None].expand(*x.shape, 1))[..., 0], None


class Mixture(Vision):
    """Its products are watched in blocks, and nothing is outside of them."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Expert() for _ in range(3))


def images(count=3):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(2, 3, 8, 8, generator=generator) for _ in range(count)]


def texts(family, make_batch):
    """Batches of different lengths and, where the model takes tokens, one with padding."""
    if family in ("conv", "vision"):
        return [make_batch(family), 2 * make_batch(family)]
    padded = make_batch(family, 9)
    mask = torch.ones_like(padded["input_ids"])
    mask[1, 5:] = 0
    return [make_batch(family), padded | {"attention_mask": mask}, make_batch(family, 7)]


def built(kind):
    torch.manual_seed(0)
    return frozen(kind())


class Streamed:
    """What a stream of all of a model's weight sites gave."""

    def __init__(self, model, batches, folder, memory_bytes=1 << 20, without=()):
        sites = discover(model, batches[0]).sites
        self.blocks = [site for site in sites if site.kind == "block"]
        wanted = [p for p in portions(sites, self.blocks) if p.block not in without]
        self.sites = [site for portion in wanted for site in portion.sites]
        self.order, self.found, self.told = [], {}, []
        activations = Activations(folder, memory_bytes)
        told = lambda done, total: self.told.append((done, total))  # noqa: E731
        self.reason = stream(model, self.blocks, wanted, batches, activations, self.keep, told)

    def keep(self, portion, sums):
        self.order.append(portion.block)
        self.found |= sums


def assert_same(found, expected):
    assert found.keys() == expected.keys() and found
    for name, statistics in expected.items():
        assert torch.equal(found[name].second_moment, statistics.second_moment), name
        assert found[name].tokens == statistics.tokens


FAMILIES = ("llama", "qwen3", "opt", "gpt2", "bert", "conv", "mixtral", "vision")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("memory_bytes", [1 << 20, 0], ids=["memory", "files"])
def test_stream_has_the_bits_of_an_ordinary_pass(
    make_model, make_batch, tmp_path, family, memory_bytes
):
    model, batches = make_model(family), texts(family, make_batch)
    streamed = Streamed(model, batches, tmp_path, memory_bytes)
    assert streamed.reason is None
    assert_same(streamed.found, collect(model, streamed.sites, batches))
    names = [block.name for block in streamed.blocks]
    assert streamed.order[: len(names)] == names and len(names) >= 2
    total = len(streamed.order) * len(batches)
    assert streamed.told == [(done, total) for done in range(1, total + 1)]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", [Vision, Shifted, Mixture])
def test_stream_of_a_chain_with_inputs_of_its_own(tmp_path, kind):
    model = built(kind)
    streamed = Streamed(model, images(), tmp_path)
    assert streamed.reason is None
    assert streamed.order == ["blocks.0", "blocks.1", "blocks.2", None]
    assert_same(streamed.found, collect(model, streamed.sites, images()))


def test_stream_of_a_model_that_is_no_chain_says_so(tmp_path):
    model = built(Skipping)
    streamed = Streamed(model, images(), tmp_path)
    assert streamed.reason == "block blocks.2 depends on more than the block before"
    assert_same(streamed.found, collect(model, streamed.sites, images()))
    assert streamed.told[-1][0] == streamed.told[-1][1]


def test_stream_where_a_batch_leaves_early(tmp_path):
    model, batches = built(Exiting), [*images(), images(1)[0] - 9]
    streamed = Streamed(model, batches, tmp_path)
    assert streamed.reason == "block blocks.2 is not run on every batch"
    assert_same(streamed.found, collect(model, streamed.sites, batches))


def test_stream_where_a_block_cannot_be_passed(tmp_path):
    class Noting(Block):
        def forward(self, x):
            return super().forward(x)[0], x.mean()

    class Adding(Vision):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(Noting() for _ in range(3))

        def forward(self, x):
            x, noted = self.patches(x).flatten(2).transpose(1, 2), 0
            for block in self.blocks:
                x, note = block(x)
                noted = noted + note
            return self.head(x.mean(1)) + noted

    model = built(Adding)
    streamed = Streamed(model, images(), tmp_path)
    assert streamed.reason.startswith("block blocks.2 cannot be run by itself (TypeError")
    assert_same(streamed.found, collect(model, streamed.sites, images()))


def test_stream_runs_through_blocks_that_are_not_wanted(make_model, make_batch, tmp_path):
    model, batches = make_model("llama"), texts("llama", make_batch)
    streamed = Streamed(model, batches, tmp_path, without=("model.layers.0", "model.layers.1"))
    assert streamed.order[0] == "model.layers.2"
    assert_same(streamed.found, collect(model, streamed.sites, batches))


def test_block_that_was_left_has_the_bits_of_a_whole_stream(tmp_path):
    """Its passes take the way of torch's attention that those did in which products were seen."""

    class Sparse(Expert):
        def __init__(self, experts):
            super().__init__()
            self.experts = self.experts if experts else None

        def forward(self, x):
            x = super().forward(x)[0] if self.experts is not None else self.attended(x)
            return x + self.mlp(x), None

        def attended(self, x):
            return x + self.attention(x, x, x, need_weights=False)[0]

    class Mixed(Vision):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([Sparse(True), Sparse(False), Sparse(False)])

    model, whole, left = built(Mixed), {}, {}
    sites = discover(model, images()[0]).sites
    blocks = [site for site in sites if site.kind == "block"]
    every = portions(sites, blocks)
    last = [portion for portion in every if portion.block == "blocks.2"]
    for wanted, found in ((every, whole), (last, left)):
        activations, keep = Activations(tmp_path), lambda _, sums, found=found: found.update(sums)
        stream(model, blocks, wanted, images(), activations, keep, others=every)
    assert_same(left, {name: whole[name] for name in left})


def test_stream_runs_no_block_more_than_it_must(make_model, make_batch, tmp_path):
    model, batches = make_model("llama"), [make_batch("llama")] * 3
    calls = [0] * len(model.model.layers)

    def count(place):
        def forward(*args, **keywords):
            calls[place] += 1
            return type(layer).forward(model.model.layers[place], *args, **keywords)

        return forward

    for place, layer in enumerate(model.model.layers):
        layer.forward = count(place)
    sites = discover(model, batches[0]).sites
    blocks = [site for site in sites if site.kind == "block"]
    wanted = [p for p in portions(sites, blocks) if p.block is not None]
    calls[:] = [0] * len(calls)
    stream(model, blocks, wanted, batches, Activations(tmp_path), lambda *_: None)
    # The batches, and the trace of the first.
    assert calls == [len(batches) + 1] * len(blocks)
    assert all("forward" in vars(layer) for layer in model.model.layers)


def test_stream_holds_the_statistics_of_one_block(make_model, make_batch, tmp_path, monkeypatch):
    model, batches = make_model("llama"), texts("llama", make_batch)
    sites = discover(model, batches[0]).sites
    blocks = [site for site in sites if site.kind == "block"]
    alive, most, sizes = weakref.WeakSet(), [0], []

    def kept(portion, sums):
        held = (found.second_moment.nbytes + found.peak.nbytes for found in sums.values())
        sizes.append(sum(held))

    def zeros(*size, dtype):
        made = torch.empty(*size, dtype=dtype).zero_()
        alive.add(made.untyped_storage())
        most[0] = max(most[0], sum(storage.nbytes() for storage in alive))
        return made

    monkeypatch.setattr("apportion.spaces.calibration.torch.zeros", zeros)
    wanted = [p for p in portions(sites, blocks) if p.block is not None]
    stream(model, blocks, wanted, batches, Activations(tmp_path), kept)
    assert most[0] == max(sizes) and len(sizes) == len(blocks) > 1


def test_stream_leaves_the_model_as_it_was(tmp_path):
    for kind in (Vision, Skipping):
        model = built(kind)
        before = [dict(vars(module)) for module in model.modules()]
        Streamed(model, images(), tmp_path)
        assert [dict(vars(module)) for module in model.modules()] == before
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_stream_that_is_stopped_keeps_finished_blocks(tmp_path):
    model, kept = built(Vision), []
    sites = discover(model, images()[0]).sites
    blocks = [site for site in sites if site.kind == "block"]

    def stop(done, total):
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stream(
            model,
            blocks,
            portions(sites, blocks),
            images(),
            Activations(tmp_path),
            lambda portion, sums: kept.append(portion.block),
            stop,
        )
    assert kept == ["blocks.0"]
    assert not any("forward" in vars(module) for module in model.modules())


def test_stream_refuses_inputs_that_are_not_finite(tmp_path):
    model = built(Vision)
    bad = images()
    bad[1][0, 0, 0, 0] = float("nan")
    with pytest.raises(InvalidInput, match=r"the inputs of site blocks\.0\.attention.* not finite"):
        stream_all(model, images()[0], bad, tmp_path)


def test_stream_without_data_says_so(tmp_path):
    with pytest.raises(InvalidInput, match=r"data\.calibration: there is no calibration data"):
        stream_all(built(Vision), images()[0], [], tmp_path)


def stream_all(model, sample, batches, folder):
    sites = discover(model, sample).sites
    blocks = [site for site in sites if site.kind == "block"]
    wanted = portions(sites, blocks)
    return stream(model, blocks, wanted, batches, Activations(folder), lambda *_: None)
