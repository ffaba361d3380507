"""Training of super-nets: one set of weights for all sub-networks of a space.

Each step trains the largest, the smallest and a few drawn sub-networks on one batch and adds up
their gradients (the sandwich rule; Yu and Huang 2019, "Universally Slimmable Networks"). The
largest learns from the targets; all others from its predictions too (in-place distillation; the
same). From those alone, as there, all can agree on a guess and never leave it; so half of what the
others learn from are the targets (as in Cai et al. 2020, "Once-for-All").

So trained, what the largest or the smallest holds is ahead of its alternatives, and a ranking of
sub-networks tells that as well. Fair steps train only drawn ones, on the targets ("FairNAS").
"""

import math
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from apportion.errors import InvalidInput
from apportion.spaces.batches import Batch, main_tensor
from apportion.spaces.checkpoints import Checkpoint, identity_of
from apportion.spaces.elastic import Elastic, trained_space
from apportion.spaces.subnetworks import Supernet, drawn, extremes

Batches = Callable[[int], tuple[Batch, Any]]
"""Step, from 0 -> what the model takes, and the targets that the loss takes."""
Loss = Callable[[Any, Any], Tensor]
"""Output of the model, targets -> a scalar."""

WARM_UP = 0.05
"""Share of the steps in which the learning rate rises."""
DISTILLED = 0.5
"""Share of the loss of all but the largest that compares with its predictions."""
NOTHING_ELASTIC: Elastic = {}


def train_supernet(
    model: nn.Module,
    batches: Batches,
    loss: Loss,
    *,
    checkpoint: str | Path,
    steps: int,
    elastic: Elastic = NOTHING_ELASTIC,
    learning_rate: float = 2e-3,
    weight_decay: float = 0.01,
    random_subnetworks: int = 2,
    fair_share: float = 0.0,
    seed: int = 0,
    save_every: int = 100,
    tell: Callable[[int, float], None] = lambda step, loss: None,
) -> None:
    """Train the sub-networks of a model in place, by AdamW; go on where a checkpoint ends.

    The learning rate rises for 5 % of the steps, then falls along a half cosine to 0. Killed at
    any moment and called again in a new process, it ends in the same weights to the bit, on the
    same machine with as many threads: a step depends on nothing but the weights and its number.
    At the end the model is in evaluation mode, and its choice blocks run what they ran before.

    Args:
        model: its output, or the output's `.logits`, are class scores `[..., classes]`. Choice
            blocks that can be sites of a study are trained, others run their active alternative.
        batches: the batch of a step, always the same for the same number. What it draws from
            torch's global generator, as what dropout draws, is drawn from `seed` and the step.
        loss: of the output and the targets, the mean over a batch.
        checkpoint: the file that is read if it is there, and written.
        steps: of the whole training; `learning_rate` is its peak.
        elastic: pattern of blocks and sub-blocks, as in a study file -> which of `keep`, `drop` and
            `cP%:first` they are trained for, all with the same weights; `keep` always is. The first
            pattern that names a site counts. Sites are found by the inputs of step 0.
        random_subnetworks: how many are drawn for each step. At each site no option comes
            twice before all came once (Chu et al. 2019, "FairNAS"): with as many as a block has
            alternatives, each is trained in every step. Fewer favor the largest and the smallest.
        fair_share: share of the steps, the last ones, that train the drawn sub-networks alone, on
            the targets alone. 1: no sandwich, each option of a site is trained as often.
        save_every: steps from one checkpoint to the next; the last step always writes one.
        tell: is called with the number of steps done and the last loss of the largest; in a fair
            step with the mean of the drawn ones' losses.

    Raises:
        InvalidInput: no sub-networks, or nothing to train; a layer that keeps running statistics;
            a setting out of range; an elastic site that is none; a loss that is not finite; a
            checkpoint of another model or of other settings.
        OSError: the checkpoint cannot be written.
    """
    settings = {"steps": steps, "learning_rate": learning_rate, "weight_decay": weight_decay}
    settings |= {"random_subnetworks": random_subnetworks, "fair_share": fair_share, "seed": seed}
    _refuse_settings(settings, save_every)
    supernet = _supernet(model, elastic, batches)
    weights = _trained_weights(model)
    optimizer = torch.optim.AdamW(weights.values(), learning_rate, weight_decay=weight_decay)
    told = {"elastic": [[p, list(o)] for p, o in elastic.items()]} if elastic else {}
    identity = identity_of(model, supernet.choices, settings | told)
    file = Checkpoint(Path(checkpoint), model, weights, optimizer, identity)
    training = _Training(supernet, optimizer, batches, loss, settings)
    done = file.read()
    with _in_training(supernet):
        for step in range(done, steps):
            optimizer.param_groups[0]["lr"] = learning_rate * _share(step, steps)
            found = training.step(step)
            if (step + 1) % save_every == 0 or step + 1 == steps:
                file.write(step + 1)
            tell(step + 1, found)


@dataclass(frozen=True)
class _Training:
    """What all steps of a training share."""

    supernet: Supernet
    optimizer: torch.optim.Optimizer
    batches: Batches
    loss: Loss
    settings: Mapping[str, Any]

    def step(self, step: int) -> float:
        """One step of the sandwich rule, gives the largest's loss; or a fair one, the mean."""
        settings = self.settings
        generator = random.Random(f"{settings['seed']}.{step}")
        chosen = drawn(self.supernet.space, settings["random_subnetworks"], generator)
        subnetworks = {f"drawn ({number})": each for number, each in enumerate(chosen)}
        fair = step >= round((1 - settings["fair_share"]) * settings["steps"])
        if not fair:
            largest, smallest = extremes(self.supernet)
            subnetworks = {"largest": largest, "smallest": smallest, **subnetworks}
        losses: list[float] = []
        teacher: Tensor | None = None
        self.optimizer.zero_grad()
        with torch.random.fork_rng():
            torch.manual_seed(generator.getrandbits(63))
            inputs, targets = self.batches(step)
            for name, subnetwork in subnetworks.items():
                output = self.supernet.run(subnetwork, inputs)
                found, scores = self.loss(output, targets), main_tensor(output).flatten(0, -2)
                if teacher is not None:
                    found = DISTILLED * cross_entropy(scores, teacher) + (1 - DISTILLED) * found
                elif not fair:
                    teacher = scores.detach().softmax(-1)
                torch.autograd.backward(_finite(found, name, step))
                losses.append(found.item())
        self.optimizer.step()
        return fmean(losses) if fair else losses[0]


def _share(step: int, steps: int) -> float:
    """Of the peak learning rate."""
    rising = max(1, round(WARM_UP * steps))
    if step < rising:
        return (step + 1) / rising
    return 0.5 + 0.5 * math.cos(math.pi * (step + 1 - rising) / (steps - rising))


def _finite(loss: Tensor, subnetwork: str, step: int) -> Tensor:
    if not isinstance(loss, Tensor) or loss.ndim:
        raise InvalidInput(
            f"the loss of a super-net is one number for a batch (a tensor of shape []), not {loss}"
        )
    if not torch.isfinite(loss):
        raise InvalidInput(
            f"the loss of the {subnetwork} sub-network is {loss.item()} in step {step}; a lower "
            "learning_rate may help, or that batch holds what is no number"
        )
    return loss


def _refuse_settings(settings: Mapping[str, Any], save_every: int) -> None:
    least = {"steps": 1, "random_subnetworks": 0, "seed": 0, "weight_decay": 0, "save_every": 1}
    given = {**settings, "save_every": save_every}
    for name, bound in least.items():
        if not given[name] >= bound:
            raise InvalidInput(f"{name} of a super-net's training is {given[name]}, not >= {bound}")
    if not 0 < given["learning_rate"] < math.inf:
        raise InvalidInput(f"learning_rate is {given['learning_rate']}, not above 0 and finite")
    if not 0 <= given["fair_share"] <= min(1, given["random_subnetworks"]):
        told = "from 0 to 1, and 0 where random_subnetworks is 0"
        raise InvalidInput(f"fair_share is {given['fair_share']}, not {told}")


def _supernet(model: nn.Module, elastic: Elastic, batches: Batches) -> Supernet:
    """The model with all that its training chooses among; it is in evaluation mode then."""

    def sample() -> Batch:
        with torch.random.fork_rng():
            return batches(0)[0]

    supernet = Supernet(model, trained_space(model.eval(), elastic, sample))
    for path, module in model.named_modules():
        if getattr(module, "track_running_stats", False):
            raise InvalidInput(
                f"{path} ({type(module).__name__}) keeps running statistics, which would be a "
                "mixture of all sub-networks' and right for none; use GroupNorm or LayerNorm"
            )
    return supernet


def _trained_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not weights:
        raise InvalidInput("no parameter of the model requires a gradient; nothing can be trained")
    return weights


@contextmanager
def _in_training(supernet: Supernet) -> Iterator[None]:
    before = {path: choice.active for path, choice in supernet.choices.items()}
    supernet.model.train()
    try:
        yield
    finally:
        for path, active in before.items():
            supernet.choices[path].select(active)
        supernet.model.eval()
