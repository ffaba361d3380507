"""Scores of gates: finite differences of each sample's own loss, and models that have none."""

import pytest
import torch
import transformers
from torch import nn

from apportion.errors import InvalidInput
from apportion.spaces.batches import call, frozen, main_tensor
from apportion.spaces.discovery import discover
from apportion.spaces.gates import gate_scores
from apportion.spaces.statistics import StatisticsFiles, write_gates

HIDDEN, WORDS, STEP = 32, 96, 1e-5
SIZES = dict(hidden_size=HIDDEN, vocab_size=WORDS, num_hidden_layers=2, intermediate_size=40)
SIZES |= dict(num_attention_heads=4)
GROUPED = SIZES | dict(num_key_value_heads=2)


class Excited(nn.Module):
    """Squeeze and excitation: channels that two layers read, one of them with a 3 x 3 kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.expand, self.norm = nn.Conv2d(8, 12, 1), nn.BatchNorm2d(12)
        self.squeeze, self.excite = nn.Conv2d(12, 4, 1), nn.Conv2d(4, 12, 1)
        self.project = nn.Conv2d(12, 8, 3, padding=1)

    def forward(self, x):
        inner = torch.relu_(self.norm(self.expand(x)))
        gate = self.excite(torch.relu(self.squeeze(inner.mean((2, 3), keepdim=True))))
        return x + self.project(inner * torch.sigmoid(gate))


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


class Flat(Mlp):
    """Takes all tokens of all samples as rows of one matrix."""

    def forward(self, x):
        return super().forward(x.reshape(-1, x.shape[-1])).view(x.shape)


class TimeFirst(Mlp):
    """Likewise, but sorted by tokens first."""

    def forward(self, x):
        by_token = x.transpose(0, 1)
        return super().forward(by_token.reshape(-1, x.shape[-1])).view_as(by_token).transpose(0, 1)


class Mixing(Mlp):
    """Each sample reads the mean of all."""

    def forward(self, x):
        return super().forward(x - x.mean(0))


class Silent(Mlp):
    def forward(self, x):
        with torch.no_grad():
            return super().forward(x)


class Residual(nn.Module):
    def __init__(self, mlp) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, x):
        return x + self.mlp(x)


class Skipping(Residual):
    """Runs its MLP where the first value is positive."""

    def forward(self, x):
        return super().forward(x) if x.flatten()[0] > 0 else x


class Net(nn.Module):
    """`[samples, tokens, 8]` -> scores of 5 classes; `head` stands in the last layer's place."""

    def __init__(self, mlp=Mlp, block=Residual, head=None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(block(mlp()) for _ in range(2))
        self.head = head or nn.Linear(8, 5)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Pictures(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.head = nn.Sequential(Excited(), Excited()), nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.blocks(x).mean((2, 3)))


def of(name, **keywords):
    """A transformers model by the name of its class without its task."""
    config = getattr(transformers, f"{name}Config")(**keywords)
    return lambda: getattr(transformers, f"{name}ForCausalLM")(config)


# What makes a model, and the site whose gates are differentiated.
CASES = {
    "heads that share keys": (of("Llama", **GROUPED), "model.layers.0.self_attn", 2),
    "heads of a fused matrix": (of("GPTNeoX", **SIZES), "gpt_neox.layers.0.attention", 4),
    "channels of a fused matrix": (
        of("Phi3", **GROUPED, pad_token_id=0, eos_token_id=2),
        "model.layers.0.mlp",
        40,
    ),
    "channels that two layers read": (Pictures, "blocks.0", 12),
    "rows of one matrix": (lambda: Net(Flat), "blocks.0.mlp", 12),
}


def made(make, dtype=torch.float64):
    torch.manual_seed(0)
    model = frozen(make()).to(dtype)
    for name, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):  # theirs computes in float32, whatever it is
            model.set_submodule(name, frozen(nn.RMSNorm(HIDDEN, 1e-6)).to(dtype))
    for value in model.parameters():
        if value.ndim > 1:
            value.mul_(2)
    return model


def inputs(model, samples=3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    if isinstance(model, transformers.PreTrainedModel):
        return {"input_ids": torch.randint(3, WORDS, (samples, 6), generator=generator)}
    dtype = next(model.parameters()).dtype
    shape = (8, 4, 5) if isinstance(model, Pictures) else (3, 8)
    return torch.randn(samples, *shape, generator=generator, dtype=torch.float64).to(dtype)


def site_of(model, batch, name):
    return next(site for site in discover(model, batch).sites if site.name == name)


def predictions(model, batch):
    """Logarithms float64 [samples, positions, classes]."""
    scores = main_tensor(call(model, batch)).double()
    return torch.log_softmax(scores if scores.ndim == 3 else scores[:, None], -1)


def drawn_labels(logs):
    """For each sample, in order, labels drawn with its number as seed [samples, positions]."""
    generators = [torch.Generator().manual_seed(number) for number in range(len(logs))]
    pairs = zip(logs, generators, strict=True)
    return torch.cat([torch.multinomial(row.exp(), 1, generator=g).T for row, g in pairs])


def losses(model, batch, labels):
    """Negative log-likelihood of each sample [samples]."""
    return -predictions(model, batch).gather(-1, labels[..., None]).sum((1, 2))


def scaled(model, site, unit, factor):
    """What reads a unit multiplies it by `factor`, by its weights."""
    for cut in site.width.cuts:
        if cut.side == "in":
            weight = model.get_submodule(cut.member.module).weight
            by_input = weight.flatten(1)
            by_input[:, cut.places([unit], site.width.units)] *= factor


@torch.no_grad()
def differences(model, site, batch):
    """Each score from central differences of every sample's loss, float64 [units]."""
    labels = drawn_labels(predictions(model, batch))
    scores = []
    for unit in range(site.width.units):
        ends = []
        for gate in (1 + STEP, 1 - STEP):
            scaled(model, site, unit, gate)
            ends.append(losses(model, batch, labels))
            scaled(model, site, unit, 1 / gate)
        scores.append(((ends[0] - ends[1]) / (2 * STEP)).square().sum())
    return torch.stack(scores)


@pytest.mark.parametrize("case", CASES)
def test_scores_are_sums_of_squared_differences_of_each_samples_loss(case):
    make, name, units = CASES[case]
    model = made(make)
    batch = inputs(model)
    site = site_of(model, batch, name)
    assert site.width.units == units
    (found,) = gate_scores(model, [site], [batch]).values()
    assert found.dtype == torch.float64 and found.max() > 1e-4
    torch.testing.assert_close(found, differences(model, site, batch), rtol=1e-5, atol=1e-9)


def test_gates_of_other_sites_change_nothing():
    model = made(CASES["heads that share keys"][0], torch.float32)
    batch = inputs(model)
    sites = [site for site in discover(model, batch).sites if site.width is not None]
    together = gate_scores(model, sites, [batch])
    assert list(together) == [site.name for site in sites] and len(sites) == 4
    for site in sites:
        assert torch.equal(gate_scores(model, [site], [batch])[site.name], together[site.name])


@pytest.mark.parametrize("case", CASES)
def test_scores_do_not_depend_on_the_size_of_batches(case):
    make, name, _ = CASES[case]
    model = made(make)
    batch = inputs(model, 6)
    site, rows = site_of(model, batch, name), []
    for size in (1, 4, 6):
        tensor = batch["input_ids"] if isinstance(batch, dict) else batch
        parts = torch.split(tensor, size)
        batches = [{"input_ids": part} if isinstance(batch, dict) else part for part in parts]
        rows.append(gate_scores(model, [site], batches)[name])
    torch.testing.assert_close(rows[0], rows[1], rtol=1e-10, atol=0)
    torch.testing.assert_close(rows[0], rows[2], rtol=1e-10, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_in_the_models_dtype_are_near_those_in_float64_and_the_same_each_time(dtype):
    make, name, _ = CASES["channels of a fused matrix"]
    model = made(make, dtype)
    batch = inputs(model)
    site, before = site_of(model, batch, name), call(model, batch).logits
    torch.manual_seed(5)  # the global generator has no say
    first, again = (gate_scores(model, [site], [batch])[name] for _ in range(2))
    assert torch.equal(first, again)
    exact = gate_scores(model.double(), [site], [batch])[name]
    # A label drawn on the edge may differ in bfloat16; here none does.
    tolerance = 1e-3 if dtype == torch.float32 else 0.2
    assert (first - exact).norm() < tolerance * exact.norm()
    after = call(model.to(dtype), batch).logits
    assert torch.equal(before, after) and not after.requires_grad


def test_progress_counts_batches_and_may_stop_between_them():
    model = made(Net)
    batch, told = inputs(model), []
    site = site_of(model, batch, "blocks.0.mlp")
    gate_scores(model, [site], [batch] * 3, told.append)
    assert told == [1, 2, 3]

    def stop(done):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gate_scores(model, [site], [batch] * 3, stop)
    assert not model.blocks[0].mlp.down._forward_pre_hooks


def test_dead_unit_scores_nothing_and_a_unit_that_counts_twice_scores_four_times():
    model = made(Net)
    batch = inputs(model)
    site = site_of(model, batch, "blocks.1.mlp")
    mlp = model.blocks[1].mlp
    mlp.up.weight[3], mlp.up.bias[3] = 0, 0
    # Unit 5 is twice unit 4: the rows that make them are alike, and the columns that read them.
    mlp.up.weight[5], mlp.up.bias[5] = mlp.up.weight[4], mlp.up.bias[4]
    mlp.down.weight[:, 5] = 2 * mlp.down.weight[:, 4]
    found = gate_scores(model, [site], [batch])["blocks.1.mlp"]
    assert found[3] == 0 and found[4] > 0
    torch.testing.assert_close(found[5], 4 * found[4])


class Named(nn.Linear):
    """An output without class scores, as an encoder's."""

    def forward(self, x):
        return transformers.modeling_outputs.BaseModelOutput(last_hidden_state=super().forward(x))


class Maps(nn.Linear):
    def forward(self, x):
        return super().forward(x)[..., None]


class Broken(nn.Linear):
    def forward(self, x):
        return super().forward(x) / 0


class Steep(nn.Linear):
    """Its gradient is infinite: the root of 0."""

    def forward(self, x):
        return super().forward(x) + (x - x.detach()).square().sum(-1, keepdim=True).sqrt()


class Overwriting(nn.Linear):
    """Changes what its own derivative needs."""

    def forward(self, x):
        x = torch.exp(x)
        scores = super().forward(x * x)
        x.zero_()
        return scores


ONE = "model.source: taylor needs the gradient of each window by itself, and blocks.0.mlp does not"
REFUSED = {
    "mixed samples": (lambda: Net(Mixing), ONE),
    "tokens before samples": (lambda: Net(TimeFirst), ONE),
    "gradients turned off": (
        lambda: Net(Silent),
        "model.source: the model's class scores have no gradient by what is in blocks.0.mlp",
    ),
    "no class scores": (lambda: Net(head=Named(8, 5)), "the model returns BaseModelOutput; ask"),
    "maps": (lambda: Net(head=Maps(8, 5)), r"the model returns Tensor \[3, 3, 5, 1\]; ask"),
    "one value": (lambda: Net(head=nn.Linear(8, 1)), r"the model returns Tensor \[3, 3, 1\]; ask"),
    "no derivative": (lambda: Net(head=Overwriting(8, 5)), "which torch cannot take .*inplace"),
    "scores not finite": (lambda: Net(head=Broken(8, 5)), "class scores are not finite"),
    "gradients not finite": (
        lambda: Net(head=Steep(8, 5)),
        "gradients by the units of blocks.0.mlp are not finite; ask",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_model_without_scores_of_gates_is_refused_with_what_to_ask_for(case):
    make, reason = REFUSED[case]
    dense = made(Net)
    sites = [site_of(dense, inputs(dense), f"blocks.{place}.mlp") for place in range(2)]
    model = made(make)
    with pytest.raises(InvalidInput, match=reason):
        gate_scores(model, sites, [inputs(model)])
    assert not model.blocks[0].mlp.down._forward_pre_hooks


def test_sub_block_that_some_batches_do_not_run_has_scores_and_one_that_none_runs_does_not():
    model = made(lambda: Net(block=Skipping))
    runs = inputs(model).abs()
    site = site_of(model, runs, "blocks.0.mlp")
    both = gate_scores(model, [site], [runs, -runs])[site.name]
    assert torch.equal(both, gate_scores(model, [site], [runs])[site.name])
    with pytest.raises(InvalidInput, match="blocks.0.mlp never runs; taylor needs gradients there"):
        gate_scores(model, [site], [-runs])
    with pytest.raises(InvalidInput, match="there is no calibration data"):
        gate_scores(model, [site], [])


def test_written_scores_are_read_back_to_the_bit(tmp_path):
    scores = {"a": torch.rand(3, dtype=torch.float64), "b.c": torch.rand(9, dtype=torch.float64)}
    write_gates(tmp_path / "gates", scores)
    files = StatisticsFiles({f"{name}:gates": tmp_path / "gates" for name in scores})
    assert all(torch.equal(files.gates(name), found) for name, found in scores.items())
