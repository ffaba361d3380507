"""Training of super-nets: one set of weights for all sub-networks that choice blocks can name.

Each step trains the largest, the smallest and a few drawn sub-networks on one batch and adds up
their gradients (the sandwich rule; Yu and Huang 2019, "Universally Slimmable Networks"). The
largest learns from the targets; all others from its predictions too (in-place distillation; the
same). From those alone, as there, all can agree on a guess and never leave it; so half of what the
others learn from are the targets (as in Cai et al. 2020, "Once-for-All").

So trained, what the largest or the smallest holds is ahead of its alternatives, and a ranking of
sub-networks tells that as well. Fair steps train only drawn ones, on the targets ("FairNAS").
"""

import itertools
import json
import math
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from apportion.errors import InvalidInput
from apportion.files import write_whole
from apportion.hashing import canonical_json, content_hash
from apportion.spaces.batches import Batch, call, main_tensor
from apportion.spaces.choice import Choice, find_choices

Batches = Callable[[int], tuple[Batch, Any]]
"""Step, from 0 -> what the model takes, and the targets that the loss takes."""
Loss = Callable[[Any, Any], Tensor]
"""Output of the model, targets -> a scalar."""
Subnetwork = Mapping[str, str]
"""Path of a choice block -> name of its alternative."""

WARM_UP = 0.05
"""Share of the steps in which the learning rate rises."""
DISTILLED = 0.5
"""Share of the loss of all but the largest that compares with its predictions."""


def train_supernet(
    model: nn.Module,
    batches: Batches,
    loss: Loss,
    *,
    checkpoint: str | Path,
    steps: int,
    learning_rate: float = 2e-3,
    weight_decay: float = 0.01,
    random_subnetworks: int = 2,
    fair_share: float = 0.0,
    seed: int = 0,
    save_every: int = 100,
    tell: Callable[[int, float], None] = lambda step, loss: None,
) -> None:
    """Train a model with choice blocks in place, by AdamW; go on where a checkpoint ends.

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
        random_subnetworks: how many are drawn for each step. In each block no alternative comes
            twice before all came once (Chu et al. 2019, "FairNAS"): with as many as a block has
            alternatives, each is trained in every step. Fewer favor the largest and the smallest.
        fair_share: share of the steps, the last ones, that train the drawn sub-networks alone, on
            the targets alone. 1: no sandwich, each alternative of a block is trained as often.
        save_every: steps from one checkpoint to the next; the last step always writes one.
        tell: is called with the number of steps done and the last loss of the largest; in a fair
            step with the mean of the drawn ones' losses.

    Raises:
        InvalidInput: no choice block, or nothing to train; a layer that keeps running statistics;
            a setting out of range; a loss that is not finite; a checkpoint of another model or of
            other settings.
        OSError: the checkpoint cannot be written.
    """
    settings = {"steps": steps, "learning_rate": learning_rate, "weight_decay": weight_decay}
    settings |= {"random_subnetworks": random_subnetworks, "fair_share": fair_share, "seed": seed}
    _refuse_settings(settings, save_every)
    choices, path = _trained_choices(model), Path(checkpoint)
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not weights:
        raise InvalidInput("no parameter of the model requires a gradient; nothing can be trained")
    optimizer = torch.optim.AdamW(weights.values(), learning_rate, weight_decay=weight_decay)
    state = _State(model, choices, weights, optimizer, settings)
    identity = {"model": _architecture(model, choices), "settings": canonical_json(settings)}
    done = _read(path, state, identity)
    with _in_training(model, choices):
        for step in range(done, steps):
            optimizer.param_groups[0]["lr"] = learning_rate * _share(step, steps)
            found = _step(state, batches, loss, step)
            if (step + 1) % save_every == 0 or step + 1 == steps:
                _write(path, state, identity | {"step": str(step + 1)})
            tell(step + 1, found)


def extremes(choices: Mapping[str, Choice]) -> tuple[Subnetwork, Subnetwork]:
    """The largest and the smallest sub-network.

    In each block, the alternative of most and that of fewest parameters; of equals the first.
    """
    sizes = {
        path: {n: sum(p.numel() for p in choice.alternatives[n].parameters()) for n in choice.names}
        for path, choice in choices.items()
    }
    largest = {path: max(size, key=size.__getitem__) for path, size in sizes.items()}
    return largest, {path: min(size, key=size.__getitem__) for path, size in sizes.items()}


@dataclass(frozen=True)
class _State:
    """What a training holds; `weights` are the model's trained parameters by name."""

    model: nn.Module
    choices: Mapping[str, Choice]
    weights: Mapping[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    settings: Mapping[str, Any]


def _step(state: _State, batches: Batches, loss: Loss, step: int) -> float:
    """One step of the sandwich rule, gives the largest's loss; or a fair one, gives the mean."""
    model, choices, settings = state.model, state.choices, state.settings
    generator = random.Random(f"{settings['seed']}.{step}")
    subnetworks = _drawn(choices, settings["random_subnetworks"], generator)
    fair = step >= round((1 - settings["fair_share"]) * settings["steps"])
    if not fair:
        largest, smallest = extremes(choices)
        subnetworks = {"largest": largest, "smallest": smallest, **subnetworks}
    losses: list[float] = []
    teacher: Tensor | None = None
    state.optimizer.zero_grad()
    with torch.random.fork_rng():
        torch.manual_seed(generator.getrandbits(63))
        inputs, targets = batches(step)
        for name, subnetwork in subnetworks.items():
            select(choices, subnetwork)
            output = call(model, inputs)
            found, scores = loss(output, targets), main_tensor(output).flatten(0, -2)
            if teacher is not None:
                found = DISTILLED * cross_entropy(scores, teacher) + (1 - DISTILLED) * found
            elif not fair:
                teacher = scores.detach().softmax(-1)
            torch.autograd.backward(_finite(found, name, step))
            losses.append(found.item())
    state.optimizer.step()
    return fmean(losses) if fair else losses[0]


def _drawn(
    choices: Mapping[str, Choice], count: int, generator: random.Random
) -> dict[str, Subnetwork]:
    """Name -> sub-network; in each block none comes twice before all came once."""
    rows = {path: generator.sample(c.names, len(c.names)) for path, c in choices.items()}
    drawn = ({path: names[n % len(names)] for path, names in rows.items()} for n in range(count))
    return {f"drawn ({number})": subnetwork for number, subnetwork in enumerate(drawn)}


def select(choices: Mapping[str, Choice], subnetwork: Subnetwork) -> None:
    """Make every choice block run its alternative."""
    for path, choice in choices.items():
        choice.select(subnetwork[path])


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


def _trained_choices(model: nn.Module) -> dict[str, Choice]:
    untreated: dict[str, str] = {}
    choices = dict(find_choices(model, untreated))
    if not choices:
        why = "".join(f"; {path or 'the model'}: {reason}" for path, reason in untreated.items())
        raise InvalidInput(f"the model has no apportion.Choice that a study can decide{why}")
    for path, module in model.named_modules():
        if getattr(module, "track_running_stats", False):
            raise InvalidInput(
                f"{path} ({type(module).__name__}) keeps running statistics, which would be a "
                "mixture of all sub-networks' and right for none; use GroupNorm or LayerNorm"
            )
    return choices


@contextmanager
def _in_training(model: nn.Module, choices: Mapping[str, Choice]) -> Iterator[None]:
    before = {path: choice.active for path, choice in choices.items()}
    model.train()
    try:
        yield
    finally:
        select(choices, before)
        model.eval()


def _architecture(model: nn.Module, choices: Mapping[str, Choice]) -> str:
    """32 hexadecimal digits of modules, shapes and alternatives; weights do not count."""
    modules = [[path, type(module).__name__] for path, module in model.named_modules()]
    tensors = [[name, str(t.dtype), list(t.shape)] for name, t in _tensors(model).items()]
    return content_hash([modules, tensors, [[p, c.names] for p, c in choices.items()]])


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, tied ones once."""
    return dict(itertools.chain(model.named_parameters(), model.named_buffers()))


def _write(path: Path, state: _State, metadata: dict[str, str]) -> None:
    held = {f"model/{name}": tensor for name, tensor in _tensors(state.model).items()}
    for name, parameter in state.weights.items():
        for key, tensor in state.optimizer.state[parameter].items():
            held[f"optimizer/{key}/{name}"] = tensor
    write_whole(path, save({name: t.detach().contiguous() for name, t in held.items()}, metadata))


def _read(path: Path, state: _State, identity: Mapping[str, str]) -> int:
    """Take all that a checkpoint holds, if there is one; gives the number of steps done."""
    if not path.exists():
        return 0
    try:
        with safe_open(path, framework="pt") as file, torch.no_grad():
            metadata = file.metadata() or {}
            _refuse_another(path, metadata, identity)
            own = _tensors(state.model)
            for name in file.keys():  # noqa: SIM118 (no mapping)
                kind, _, rest = name.partition("/")
                if kind == "model":
                    own[rest].copy_(file.get_tensor(name))
                    continue
                key, _, of = rest.partition("/")
                stored, weight = file.get_tensor(name), state.weights[of]
                # AdamW keeps its count of steps on the processor, the rest beside the weight
                place = stored if key == "step" else stored.to(weight.device)
                state.optimizer.state[weight][key] = place
    except SafetensorError as error:
        raise InvalidInput(f"{path} is no checkpoint: {error}; remove it") from error
    return int(metadata["step"])


def _refuse_another(path: Path, metadata: Mapping[str, str], identity: Mapping[str, str]) -> None:
    if not {"step", *identity} <= set(metadata):
        raise InvalidInput(f"{path} is a safetensors file, but no checkpoint of a super-net")
    if metadata["model"] != identity["model"]:
        raise InvalidInput(
            f"{path} is the checkpoint of another model: its modules, shapes or alternatives "
            "differ; name another file, or remove it to begin afresh"
        )
    before, now = json.loads(metadata["settings"]), json.loads(identity["settings"])
    changed = [f"{key} {before[key]} -> {now[key]}" for key in now if before[key] != now[key]]
    if changed:
        raise InvalidInput(
            f"{path} was trained with other settings ({', '.join(changed)}); give the same, name "
            "another file, or remove it to begin afresh"
        )
