"""How much a model's own predictions depend on each head or channel: for `cP%:taylor`.

A gate g = 1 multiplies all features of a unit wherever a layer reads them, so to leave the unit out
is to set its gate to 0. A unit's score is the sum over samples of (d loss / d g)^2, where

    d loss / d g = sum over positions and features of activation * d loss / d activation

is the first-order term of the loss without the unit: Molchanov and others (2019), "Importance
Estimation for Neural Network Pruning", with gates; LLM-Pruner (Ma and others, 2023) takes it of
whole structures. A divergence from the dense model has no gradient at the dense model. So the loss
is the negative log-likelihood of labels that are drawn from the model's own predictions, a label
for each position, and what is summed is an estimate of the diagonal of the Fisher information, the
second-order term of that divergence (Theis and others, 2018, "Faster gaze prediction with dense
networks and Fisher pruning"). Labels are drawn with a seed that is the sample's number. A sample
is a window of text, or a row of any other batch.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax

from apportion.errors import InvalidInput
from apportion.spaces.batches import Batch, call, main_tensor
from apportion.spaces.compressors.ranks import positions_of
from apportion.spaces.sites import Cut, Site

INSTEAD = "ask for another method, such as c75%:obs"
Gates = list[tuple[str, Tensor]]


@torch.enable_grad()
def gate_scores(
    model: nn.Module,
    sites: Sequence[Site],
    batches: Iterable[Batch],
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, Tensor]:
    """The Fisher information of every unit's gate, one backward pass for each batch.

    Of a batch the activations of the whole model are held, so batches should be small. The scores
    do not depend on their sizes, but for rounding.

    Args:
        model: the dense model, its parameters without gradients.
        sites: structure sites with a width in heads or channels.
        batches: calibration data.
        progress: told how many batches are done.

    Returns:
        Name of a site -> float64 [units].

    Raises:
        InvalidInput: no data; the model gives no class scores, or cannot be differentiated; a
            sub-block that never runs, whose gates have no gradient, or none of its own for each
            sample; gradients that are not finite.
    """
    scores: dict[str, Tensor] = {}
    done = samples = 0
    with _gated(model, sites) as gates:
        for done, batch in enumerate(batches, 1):
            gates.clear()
            with _differentiable():
                losses = own_losses(_class_scores(call(model, batch)), samples)
                if done == 1 and len(losses) > 1:
                    _check_apart(losses[0], gates, len(losses))
                found = _gradients(losses.sum(), gates, len(losses))
            for name, gradient in found.items():
                scores[name] = scores.get(name, 0) + gradient.square().sum(0)
            samples += len(losses)
            progress(done)
    if done == 0:
        raise InvalidInput("data.calibration: there is no calibration data")
    for site in sites:
        if site.name not in scores:
            raise InvalidInput(
                f"data.calibration: {site.name} never runs; taylor needs gradients there, {INSTEAD}"
            )
    return scores


def own_losses(logits: Tensor, first: int) -> Tensor:
    """Negative log-likelihood of labels drawn from the predictions themselves, nats [samples].

    Args:
        logits: [samples, positions, classes].
        first: number of the first sample; each one's labels are drawn with its number as seed.

    Raises:
        InvalidInput: a prediction is not finite.
    """
    # Half precision is too coarse for probabilities; float64 stays.
    logs = log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), -1)
    if bool(logs.isnan().any()):
        raise InvalidInput("data.calibration: the dense model's class scores are not finite")
    losses = []
    for number, row in enumerate(logs, first):
        generator = torch.Generator(row.device).manual_seed(number)
        labels = torch.multinomial(row.detach().exp(), 1, generator=generator)
        losses.append(-row.gather(-1, labels).sum())
    return torch.stack(losses)


def _class_scores(output: Any) -> Tensor:
    """The scores that a model gives, [samples, positions, classes]."""
    nameless = isinstance(output, Mapping) and not isinstance(getattr(output, "logits", 0), Tensor)
    found = None if nameless else main_tensor(output)
    if found is not None and found.is_floating_point() and found.shape[-1] > 1:
        if found.ndim == 2:
            return found[:, None]
        if found.ndim == 3:
            return found
    told = "" if found is None else f" {list(found.shape)}"
    raise InvalidInput(
        f"model.source: taylor takes the model's class scores, [windows, classes] or [windows, "
        f"positions, classes], and the model returns {type(output).__name__}{told}; {INSTEAD}"
    )


@contextmanager
def _differentiable() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        told = " ".join(str(error).split())
        raise InvalidInput(
            "model.source: taylor needs the gradient of the whole model, which torch cannot take "
            f"({told}); {INSTEAD}"
        ) from error


@contextmanager
def _gated(model: nn.Module, sites: Iterable[Site]) -> Iterator[Gates]:
    """Put gates of ones before the layers that read units, in every pass that is made meanwhile.

    Gives (name of the site, gates [rows, units]) of each layer that ran; clear it before a pass.
    """
    gates: Gates = []
    with ExitStack() as undo:
        for site in sites:
            if site.width is None:
                raise ValueError(f"{site.name} has no width")
            for cut in site.width.cuts:
                if cut.side == "in":
                    gate = _gate(site.name, site.width.units, cut, gates)
                    module = model.get_submodule(cut.member.module)
                    undo.callback(module.register_forward_pre_hook(gate, with_kwargs=True).remove)
        yield gates


def _gate(name: str, units: int, cut: Cut, gates: Gates) -> Callable[..., tuple[Any, ...]]:
    def multiply(
        module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]
    ) -> tuple[Any, ...]:
        given = args[0] if args else keywords["input"]
        dimension = given.ndim - (1 if cut.member.shape.conv is None else 3)
        if dimension == 0:
            raise InvalidInput(_mixed(name))
        # Products are summed in float32 at least; a factor of 1 leaves the bits as they are.
        dtype = torch.promote_types(given.dtype, torch.float32)
        gate = torch.ones(len(given), units, dtype=dtype, device=given.device, requires_grad=True)
        gates.append((name, gate))
        shape = [1] * given.ndim
        shape[0], shape[dimension] = len(given), given.shape[dimension]
        passed = (given.to(dtype) * _by_feature(gate, cut).view(shape)).to(given.dtype)
        return ((passed, *args[1:]), keywords) if args else (args, {**keywords, "input": passed})

    return multiply


def _by_feature(gate: Tensor, cut: Cut) -> Tensor:
    """The gates of units [rows, units] as those of a layer's input features [rows, features]."""
    features = cut.features // positions_of(cut.member.shape)
    return gate[:, None, :, None].expand(-1, cut.stacks, -1, features).flatten(1)


def _gradients(
    loss: Tensor, gates: Gates, samples: int, keep_graph: bool = False
) -> dict[str, Tensor]:
    """Site -> gradient by its gates, of several layers their sum, float64 [samples, units].

    A layer may be given several rows of a sample, one after the other (all tokens in one matrix).
    """
    if not gates:
        return {}
    if not loss.requires_grad:
        raise InvalidInput(_unfelt(gates[0][0]))
    leaves = [gate for _, gate in gates]
    grads = torch.autograd.grad(loss, leaves, retain_graph=keep_graph, allow_unused=True)
    total: dict[str, Tensor] = {}
    for (name, gate), grad in zip(gates, grads, strict=True):
        if grad is None:
            continue
        if len(gate) % samples:
            raise InvalidInput(_mixed(name))
        by_sample = grad.double().view(samples, -1, gate.shape[1]).sum(1).cpu()
        total[name] = total[name] + by_sample if name in total else by_sample
    for name, _ in gates:
        if name not in total:
            raise InvalidInput(_unfelt(name))
        if not bool(total[name].isfinite().all()):
            raise InvalidInput(
                f"data.calibration: gradients by the units of {name} are not finite; {INSTEAD}"
            )
    return total


def _check_apart(loss: Tensor, gates: Gates, samples: int) -> None:
    """Have the first sample's loss depend on no gate of another's: it is proven, not assumed."""
    for name, gradient in _gradients(loss, gates, samples, keep_graph=True).items():
        if bool(gradient[1:].any()):
            raise InvalidInput(_mixed(name))


def _unfelt(name: str) -> str:
    return (
        f"model.source: the model's class scores have no gradient by what is in {name}: nothing of "
        f"it reaches them, or its forward turns gradients off; {INSTEAD}"
    )


def _mixed(name: str) -> str:
    return (
        "model.source: taylor needs the gradient of each window by itself, and "
        f"{name} does not keep the windows of a batch apart, in their order; {INSTEAD}"
    )
