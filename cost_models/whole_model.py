"""Whole models against the dense one: configurations with random weights, and finished ones."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from apportion.cost_models.harness import BLOCK, Measurement, compare
from apportion.cost_models.operators import Given, model_dtype
from apportion.cost_models.random_weights import random_weights
from apportion.cost_models.requests import RequestItem, runner
from apportion.cost_models.session import Timing, threads_set
from apportion.hashing import content_hash
from apportion.spaces.apply import apply, drop
from apportion.spaces.batches import Batch
from apportion.spaces.narrowing import shared_copy
from apportion.spaces.sites import Site
from apportion.spaces.space import Configuration, Space

Implementations = Mapping[str, Mapping[str, str]]
"""Site name -> option text -> name of the implementation that serves it."""


def signature(module: nn.Module, given: Sequence[Given] = ()) -> str:
    """32 hexadecimal digits of what a module is made of and what its layers are given."""
    parts = [[name, *_described(part)] for name, part in module.named_modules()]
    tensors = [
        [name, str(t.dtype), list(t.shape)]
        for name, t in itertools.chain(module.named_parameters(), module.named_buffers())
    ]
    inputs = [[list(each.shape), each.dtype] for each in given]
    return content_hash([parts, tensors, inputs])


def _described(part: nn.Module) -> list[str]:
    """Its type; of a convolution or a pooling also its geometry, which no shape of a tensor has."""
    geometry = [part.extra_repr()] if hasattr(part, "stride") else []
    return [type(part).__name__, *geometry]


def configured(
    model: nn.Module,
    space: Space,
    configuration: Configuration,
    implementations: Implementations,
    rank_multiple: int,
) -> nn.Module:
    """A copy of the model that runs a configuration with random weights."""
    built = shared_copy(model)
    stored = random_weights(space, model_dtype(model), rank_multiple)
    apply(built, space, configuration, stored, implementations)
    return built.eval()


def without(model: nn.Module, dropped: Sequence[Site]) -> nn.Module:
    """A copy of the model without some of its structure sites."""
    built = shared_copy(model)
    for site in dropped:
        drop(built, site)
    return built.eval()


def compare_models(
    build: Mapping[str, Callable[[], nn.Module]],
    dense: nn.Module,
    request: Sequence[RequestItem],
    sample: Batch,
    *,
    threads: int,
    seconds: float = 3.0,
    seed: int = 0,
    timing: Timing | None = None,
) -> dict[str, Measurement]:
    """Time whole models beside the dense one.

    Args:
        build: name -> makes the model; at most a few are alive at a time.
        dense: the reference.
        request: what latency means; ratios and milliseconds are those of the whole request.
        sample: a batch of the study's data.
        threads: intra-op threads.
        seconds: for each model and request item.
        seed: of the interleaving.
        timing: half width and clock.
    """
    timing = timing or Timing()
    names, found = list(build), {}
    with threads_set(threads), torch.no_grad():
        while names:
            batch, names = names[:BLOCK], names[BLOCK:]
            models = {name: build[name]().eval() for name in batch}
            by_item = [
                compare(
                    {name: runner(model, item, sample) for name, model in models.items()},
                    runner(dense, item, sample),
                    seconds=seconds,
                    half_width=timing.half_width,
                    seed=seed,
                    clock=timing.clock,
                )
                for item in request
            ]
            for name in batch:
                found[name] = summed(
                    [(i.count, m[name]) for i, m in zip(request, by_item, strict=True)]
                )
    return found


def summed(parts: Sequence[tuple[int, Measurement]]) -> Measurement:
    """One measurement of a request from those of its items, each with its count."""
    dense = sum(count * m.reference_milliseconds for count, m in parts)

    def share(value: Callable[[Measurement], float]) -> float:
        return sum(count * value(m) * m.reference_milliseconds for count, m in parts) / dense

    ratio = share(lambda m: m.ratio)
    return Measurement(
        ratio=ratio,
        low=share(lambda m: m.low),
        high=share(lambda m: m.high),
        milliseconds=ratio * dense,
        pairs=min(m.pairs for _, m in parts),
        stopped_by="width" if all(m.stopped_by == "width" for _, m in parts) else "time",
    )


def whole_description(
    model: str, item: RequestItem, threads: int, operators: Sequence[str], dropped: Sequence[str]
) -> dict[str, Any]:
    """What identifies a timing of a whole model: which operators run in place of which layers.

    Args:
        model: signature of the dense model.
        item: the work; its count does not matter.
        threads: intra-op threads.
        operators: keys of all operators that replace layers, repeated as often as they run.
        dropped: signatures of all that is dropped.
    """
    work = {k: v for k, v in item.to_json().items() if k != "count"}
    return {
        "model": model,
        "work": work,
        "threads": threads,
        "operators": sorted(operators),
        "dropped": sorted(dropped),
    }
