"""Training of super-nets: the sandwich rule, what it refuses, and ends of killed processes."""

import copy
import itertools
import math
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from apportion import Choice, train_supernet
from apportion.errors import InvalidInput
from apportion.hashing import tensors_hash
from apportion.spaces.elastic import trained_space
from apportion.spaces.subnetworks import Supernet, extremes

WIDTH, CLASSES = 8, 3


def block() -> Choice:
    wide = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.ReLU(), nn.Linear(2 * WIDTH, WIDTH))
    return Choice({"narrow": nn.Linear(WIDTH, WIDTH), "wide": wide, "skip": nn.Identity()})


def perceptron() -> nn.Module:
    """`[n, 8]` -> `[n, 3]`."""
    return nn.Sequential(block(), nn.Dropout(0.1), nn.Tanh(), block(), nn.Linear(WIDTH, CLASSES))


class Convolutional(nn.Module):
    """`[n, 8]` -> `[n, 3]`, the input as a row of points."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(1, 4, 1)
        self.block = Choice({str(k): nn.Conv1d(4, 4, k, padding=k // 2) for k in (5, 3)})
        self.norm = nn.GroupNorm(2, 4)
        self.head = nn.Linear(4 * WIDTH, CLASSES)

    def forward(self, x):
        return self.head(torch.relu(self.norm(self.block(self.stem(x[:, None])))).flatten(1))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x):
        return torch.softmax(self.q(x) @ self.k(x).transpose(-1, -2), -1) @ self.v(x)


class Transformer(nn.Module):
    """`[n, 8]`, read as 8 tokens of 3 -> `[n, 8, 3]`; embedding and head are tied."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(CLASSES, WIDTH)
        self.attention = Choice({"attend": Attention(), "skip": nn.Identity()})
        self.norm, self.mlp = nn.LayerNorm(WIDTH), block()
        self.head = nn.Linear(WIDTH, CLASSES, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        x = self.embed((x > 0).long())
        x = x + self.attention(x)
        return self.head(x + self.mlp(self.norm(x)))


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The class is the greatest of the first three inputs."""
    x = torch.randn(32, WIDTH)
    return x, x[:, :CLASSES].argmax(-1)


def tokens(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The class of a token is whether it is above zero."""
    x = torch.randn(8, WIDTH)
    return x, (x > 0).long()


def over_positions(output: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return cross_entropy(output.flatten(0, -2), targets.flatten())


def seeded(make, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return make()


def train(model: nn.Module, folder: Path, **settings) -> nn.Module:
    given = {"steps": 12, "save_every": 5, "checkpoint": folder / "supernet"} | settings
    loss = over_positions if isinstance(model, Transformer) else cross_entropy
    data = tokens if isinstance(model, Transformer) else batch
    train_supernet(model, given.pop("batches", data), given.pop("loss", loss), **given)
    return model


def weights_hash(model: nn.Module) -> str:
    return tensors_hash(dict(model.named_parameters()))


def test_one_step_adds_up_the_gradients_of_largest_and_distilled_smallest(tmp_path):
    model = seeded(lambda: nn.Sequential(block(), nn.Linear(WIDTH, CLASSES))).double()
    torch.manual_seed(1)
    x, labels = torch.randn(4, WIDTH, dtype=torch.float64), torch.tensor([0, 2, 1, 1])
    by_hand = copy.deepcopy(model)
    largest = by_hand[1](by_hand[0].alternatives["wide"](x))
    smallest = by_hand[1](x)
    teacher = largest.detach().exp() / largest.detach().exp().sum(-1, keepdim=True)
    distilled = -(teacher * smallest.log_softmax(-1)).sum(-1).mean()
    taught = (distilled + cross_entropy(smallest, labels)) / 2
    (cross_entropy(largest, labels) + taught).backward()
    torch.optim.AdamW(by_hand.parameters(), 0.01, weight_decay=0.1).step()

    settings = {"steps": 1, "learning_rate": 0.01, "weight_decay": 0.1, "random_subnetworks": 0}
    train(model, tmp_path, batches=lambda step: (x, labels), **settings)
    for name, parameter in by_hand.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), parameter, rtol=0, atol=1e-12)


def test_fair_step_trains_every_alternative_once_and_on_the_targets_alone(tmp_path):
    model = seeded(lambda: nn.Sequential(block(), nn.Linear(WIDTH, CLASSES))).double()
    torch.manual_seed(1)
    x, labels = torch.randn(4, WIDTH, dtype=torch.float64), torch.tensor([0, 2, 1, 1])
    by_hand = copy.deepcopy(model)
    for alternative in by_hand[0].alternatives.values():
        cross_entropy(by_hand[1](alternative(x)), labels).backward()
    torch.optim.AdamW(by_hand.parameters(), 0.01, weight_decay=0.1).step()

    settings = {"steps": 1, "learning_rate": 0.01, "weight_decay": 0.1, "random_subnetworks": 3}
    train(model, tmp_path, batches=lambda step: (x, labels), fair_share=1.0, **settings)
    for name, parameter in by_hand.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), parameter, rtol=0, atol=1e-12)


def test_fair_steps_are_the_last_ones(tmp_path):
    model, seen = seeded(perceptron), []
    model[0].alternatives["wide"].register_forward_hook(lambda *_: seen.append(model[3].active))
    # of the three drawn ones one is wide in the first block; the largest is wide in both
    train(model, tmp_path, steps=8, random_subnetworks=3, fair_share=0.25)
    assert len(seen) == 6 * 2 + 2 * 1
    assert seen[:12:2] == ["wide"] * 6


def supernet_of(model: nn.Module) -> Supernet:
    return Supernet(model, trained_space(model, {}, lambda: pytest.fail("asked for a batch")))


def subnetworks(supernet: Supernet) -> list[dict[str, str]]:
    """All of them."""
    names = supernet.space.names
    chosen = itertools.product(*supernet.space.texts)
    return [dict(zip(names, texts, strict=True)) for texts in chosen]


@pytest.mark.parametrize("make", [perceptron, Convolutional, Transformer])
def test_extremes_are_those_of_all_subnetworks(make):
    supernet = supernet_of(make())
    choices = supernet.choices

    def size(subnetwork) -> int:
        names = {path: option.removeprefix("op:") for path, option in subnetwork.items()}
        active = (choices[path].alternatives[name] for path, name in names.items())
        return sum(p.numel() for module in active for p in module.parameters())

    sizes = [size(each) for each in subnetworks(supernet)]
    assert tuple(map(size, extremes(supernet))) == (max(sizes), min(sizes))


@pytest.mark.parametrize("make", [perceptron, Convolutional, Transformer])
def test_every_subnetwork_learns(make, tmp_path):
    supernet = supernet_of(train(seeded(make), tmp_path, steps=150, learning_rate=0.02))
    torch.manual_seed(1)
    x, labels = (tokens if make is Transformer else batch)(0)
    for subnetwork in subnetworks(supernet):
        with torch.no_grad():
            output = supernet.run(subnetwork, x)
            assert over_positions(output, labels) < 0.6 * math.log(CLASSES)


@pytest.mark.parametrize("make", [perceptron, Transformer])
def test_training_that_ends_anywhere_and_goes_on_gives_the_same_weights(make, tmp_path):
    (tmp_path / "whole").mkdir()
    expected = weights_hash(train(seeded(make), tmp_path / "whole", fair_share=0.5))
    for last in range(12):
        folder = tmp_path / str(last)
        folder.mkdir()

        def ending(step: int, last: int = last):
            if step == last:
                raise TimeoutError
            return tokens(step) if make is Transformer else batch(step)

        with pytest.raises(TimeoutError):
            train(seeded(make), folder, batches=ending, fair_share=0.5)
        # the weights that it starts with again do not matter once there is a checkpoint
        again = seeded(make, seed=7 if last >= 5 else 0)
        assert weights_hash(train(again, folder, fair_share=0.5)) == expected


PROGRAM = """
import runpy, sys
from pathlib import Path
there = runpy.run_path(sys.argv[1])
model = there["seeded"](there["perceptron"])
tell = lambda step, loss: print(step, flush=True)
there["train"](model, Path(sys.argv[2]), steps=300, save_every=7, tell=tell)
print(there["weights_hash"](model))
"""


def test_killed_process_is_continued_to_the_same_bits(tmp_path):
    command = [sys.executable, "-P", "-c", PROGRAM, __file__, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if int(line) == 40:
                process.send_signal(signal.SIGKILL)
                break
    assert process.returncode == -signal.SIGKILL
    continued = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert 36 <= int(continued[0])
    (tmp_path / "supernet").unlink()
    whole = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert whole[0] == "1" and whole[-1] == continued[-1]


def test_finished_training_is_read_and_not_continued(tmp_path):
    trained = weights_hash(train(seeded(perceptron), tmp_path))
    again = train(seeded(perceptron, seed=7), tmp_path, batches=lambda step: pytest.fail("trained"))
    assert weights_hash(again) == trained


def test_choice_blocks_run_afterwards_what_they_ran_before(tmp_path):
    model = seeded(perceptron)
    model[3].select("skip")
    train(model, tmp_path)
    assert (model[0].active, model[3].active, model.training) == ("narrow", "skip", False)


@pytest.mark.parametrize(
    ("model", "told"),
    [
        (nn.Linear(WIDTH, CLASSES), "no apportion.Choice"),
        (block(), "the model: the whole model is a choice block"),
        (nn.Sequential(block(), nn.BatchNorm1d(WIDTH)), r"1 \(BatchNorm1d\) keeps running"),
        (perceptron().requires_grad_(False), "no parameter .* requires a gradient"),
    ],
    ids=["none", "whole", "statistics", "frozen"],
)
def test_model_that_cannot_be_trained_is_refused_with_the_reason(model, told, tmp_path):
    with pytest.raises(InvalidInput, match=told):
        train(model, tmp_path)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"steps": 0}, "steps .* is 0, not >= 1"),
        ({"learning_rate": math.nan}, "learning_rate is nan"),
        ({"fair_share": 1.5}, "fair_share is 1.5, not from 0 to 1"),
        ({"fair_share": 0.5, "random_subnetworks": 0}, "and 0 where random_subnetworks is 0"),
        ({"loss": lambda output, targets: output}, "one number for a batch"),
        (
            {
                "batches": lambda step: (
                    batch(step)[0] + (math.inf if step == 3 else 0),
                    batch(0)[1],
                )
            },
            "largest sub-network is nan in step 3;",
        ),
    ],
    ids=["steps", "rate", "share", "none-drawn", "shape", "not-finite"],
)
def test_what_no_training_can_use_is_refused(settings, told, tmp_path):
    with pytest.raises(InvalidInput, match=told):
        train(seeded(perceptron), tmp_path, **settings)


@pytest.mark.parametrize(
    ("make", "settings", "told"),
    [
        (perceptron, {"steps": 20, "seed": 3}, r"\(seed 0 -> 3, steps 12 -> 20\)"),
        (Convolutional, {}, "another model"),
    ],
    ids=["settings", "model"],
)
def test_checkpoint_of_something_else_is_refused(make, settings, told, tmp_path):
    train(seeded(perceptron), tmp_path)
    with pytest.raises(InvalidInput, match=told):
        train(seeded(make), tmp_path, **settings)


def test_file_that_is_no_checkpoint_is_refused(tmp_path):
    (tmp_path / "supernet").write_bytes(b"something else")
    with pytest.raises(InvalidInput, match="supernet is no checkpoint"):
        train(seeded(perceptron), tmp_path)
