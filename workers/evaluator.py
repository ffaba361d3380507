"""The evaluator: one configuration on one slice of data -> loss and weight of each window."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from apportion.errors import ApportionError, InvalidInput
from apportion.spaces.apply import Dropped, bias_of
from apportion.spaces.batches import call, main_tensor
from apportion.spaces.caches import attention_of, pack_cache
from apportion.spaces.choice import OPERATION, choice_at
from apportion.spaces.grammar import parse_option
from apportion.spaces.narrowing import shared_copy
from apportion.spaces.sites import Cached, Site
from apportion.spaces.space import DENSE, DROP, KEEP, Configuration, Space
from apportion.spaces.views import parameter_at, set_parameter
from apportion.workers.objectives import Objective, dense_loss, negative_log_likelihood
from apportion.workers.prefix import Blocks, Gate, execution_order, size_bytes
from apportion.workers.realized import RealizedStore
from apportion.workers.samples import Chunk, Part, Samples
from apportion.workers.sources import OpenedModel


@dataclass(frozen=True)
class Evaluate:
    """The work: a configuration, and windows [first_window, first_window + windows) of a part."""

    configuration: Configuration
    part: Part
    first_window: int
    windows: int

    @property
    def size(self) -> int:
        """Windows."""
        return self.windows

    def failed(self, reason: str, seconds: float, error_class: str) -> "Evaluation":
        """An evaluation without a loss."""
        return Evaluation(None, None, reason, seconds, error_class)


@dataclass(frozen=True)
class Evaluation:
    """What came of it.

    Attributes:
        losses: sum of the loss over each window, float64 [windows]; None after a failure.
        weights: scored positions of each window, float64 [windows]; None after a failure.
        failure: why there is no loss, in one line, or None.
        seconds: wall time.
        error_class: what kind of failure, or None: "raised" and "not finite" are the
            configuration's; "timeout", "memory" and "died" are of this machine and run.
    """

    losses: NDArray[np.float64] | None
    weights: NDArray[np.float64] | None
    failure: str | None
    seconds: float
    error_class: str | None = None


@dataclass(frozen=True)
class Budgets:
    """Bounds of what an evaluator keeps besides the model, in bytes."""

    references: int = 1 << 30
    prefixes: int = 1 << 29
    realized: int = 1 << 30


class Evaluator:
    """One resident model that runs the reference semantics of any configuration of a space."""

    def __init__(
        self,
        opened: OpenedModel,
        space: Space,
        blocks: Sequence[Site],
        store: RealizedStore,
        objective: Objective,
        open_part: Callable[[Part], Samples],
        *,
        chunk_windows: int = 8,
        budgets: Budgets | None = None,
    ) -> None:
        """Takes over the model.

        Args:
            opened: the dense model; nothing else may use it from here on.
            space: what can be chosen.
            blocks: the model's blocks, in the space or not.
            store: gives the layers of a realized option.
            objective: the loss.
            open_part: gives the windows of a part of the data.
            chunk_windows: windows of one forward pass, on a fixed grid.
            budgets: bounds of the caches.
        """
        self.model = opened.model
        self.is_causal_lm = opened.is_causal_lm
        self.space = space
        self.objective = objective
        self.chunk_windows = chunk_windows
        self.budgets = budgets or Budgets()
        self._store = store
        self._open_part = open_part
        self._chunks: dict[Part, list[Chunk]] = {}
        self._part: Part | None = None
        self._references: dict[int, Any] = {}
        self._reference_bytes = 0
        self._neutral = space.canonical({})
        self._current = dict(self._neutral)
        self._forward_without_cache()
        # Before anything is replaced: what treatments narrow is the dense model.
        treats = any(option.narrows for row in space.options for option in row)
        self._untouched = shared_copy(self.model) if treats else self.model
        self._watch_blocks([site.name for site in blocks])
        members = [member for site in space.sites for member in site.members]
        self._layers = {
            member.module: self.model.get_submodule(member.module)
            for member in members
            if not member.written_back
        }
        self._parameters = {
            member.parameter_path: parameter_at(self.model, member.parameter_path)
            for member in members
            if member.written_back
        }
        norms = (site.norm.paths for site in space.sites if site.norm is not None)
        self._parameters |= {p: parameter_at(self.model, p) for paths in norms for p in paths}
        self._packings: dict[str, RemovableHandle] = {}
        self._biases = {path: bias_of(self.model, path) for path in self._layers}

    def _forward_without_cache(self) -> None:
        config = getattr(self.model, "config", None)
        if config is not None and hasattr(config, "use_cache"):
            config.use_cache = False

    def _watch_blocks(self, blocks: Sequence[str]) -> None:
        first = self.chunks("search")[0]
        modules = [p for site in self.space.sites for p in _modules(site)]
        order, places = execution_order(
            self.model, blocks, modules, lambda: call(self.model, self._inputs(first))
        )
        structures = [s.name for s in self.space.sites if s.is_structure and s.cache is None]
        names = [*order, *structures]
        self._gates = {name: Gate(self.model.get_submodule(name)) for name in dict.fromkeys(names)}
        self._blocks = Blocks([self._gates[name] for name in order], self.budgets.prefixes)
        self._sites_of_block: list[list[str]] = [[] for _ in order]
        for site in self.space.sites:
            place = min(places[path] for path in _modules(site))
            if place < len(order):
                self._sites_of_block[place].append(site.name)

    def chunks(self, part: Part) -> list[Chunk]:
        """The fixed grid of forward passes of a part."""
        if part not in self._chunks:
            self._chunks[part] = self._open_part(part).chunks(self.chunk_windows)
        return self._chunks[part]

    def _inputs(self, chunk: Chunk) -> Any:
        return self.objective.inputs(chunk.batch)

    def evaluate(self, work: Evaluate) -> Evaluation:
        """Loss and weight of each window.

        Raises:
            ApportionError: windows that the part does not have, or a bank entry is missing.
            InvalidInput: an unknown site or option, or the user's loss function fails.
        """
        started = time.perf_counter()
        last = work.first_window + work.windows
        chunks = [
            (place, chunk)
            for place, chunk in enumerate(self.chunks(work.part))
            if chunk.first < last and chunk.first + chunk.windows > work.first_window
        ]
        if work.windows < 1 or not chunks or chunks[-1][1].first + chunks[-1][1].windows < last:
            raise ApportionError(f"{work.part} has no windows {work.first_window} to {last}")
        wanted = self.space.canonical(work.configuration)
        measured = [self._measure(wanted, work.part, place, chunk) for place, chunk in chunks]
        # The grid is fixed, so a window's value does not depend on the slice that asks for it.
        skip = work.first_window - chunks[0][1].first
        losses, weights = (
            np.concatenate([pair[k] for pair in measured])[skip : skip + work.windows]
            for k in (0, 1)
        )
        seconds = time.perf_counter() - started
        if not (np.isfinite(losses).all() and np.isfinite(weights).all()):
            window = work.first_window + int(np.argmin(np.isfinite(losses + weights)))
            failure = f"the loss of window {window} is not finite"
            return Evaluation(None, None, failure, seconds, "not finite")
        return Evaluation(losses, weights, None, seconds)

    def check(self, part: Part = "search") -> float:
        """Try the dense model before any work; gives its loss on the first windows of `part`.

        Raises:
            InvalidInput: its outputs are not finite or not repeatable, or a language model
                predicts no better than chance.
        """
        chunk = self.chunks(part)[0]
        reference = self._reference(part, 0, chunk)
        loss = dense_loss(self.objective, reference, chunk.batch)
        if self.objective.source == "kl":
            again = self._whole_pass(chunk)
            if np.any(self.objective.measure(again, chunk.batch, reference)[0] != 0):
                raise InvalidInput(
                    "model.source: the same input gives another output the second time; "
                    "a study needs a model without randomness"
                )
        if self.is_causal_lm:
            _check_prediction(reference, chunk)
        return loss

    @torch.inference_mode()
    def _whole_pass(self, chunk: Chunk) -> Any:
        self._install(self._neutral)
        return call(self.model, self._inputs(chunk))

    @torch.inference_mode()
    def _measure(
        self, wanted: Configuration, part: Part, place: int, chunk: Chunk
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        reference = None
        if self.objective.needs_reference:
            reference = self._reference(part, place, chunk)
        output = self._output(wanted, part, place, chunk)
        return self.objective.measure(output, chunk.batch, reference)

    @torch.inference_mode()
    def _reference(self, part: Part, place: int, chunk: Chunk) -> Any:
        """The dense model's output, from memory where it fits."""
        self._begin_part(part)
        if place in self._references:
            return self._references[place]
        output = self._output(self._neutral, part, place, chunk)
        size = size_bytes(output)
        if self._reference_bytes + size <= self.budgets.references:
            self._references[place] = output
            self._reference_bytes += size
        return output

    def _output(self, wanted: Configuration, part: Part, place: int, chunk: Chunk) -> Any:
        self._begin_part(part)
        self._install(wanted)
        marks = [tuple(wanted[name] for name in names) for names in self._sites_of_block]
        inputs = self._inputs(chunk)
        return self._blocks.run(
            place, marks, wanted == self._neutral, lambda: call(self.model, inputs)
        )

    def _begin_part(self, part: Part) -> None:
        """Caches hold one part at a time."""
        if part != self._part:
            self._part = part
            self._references.clear()
            self._reference_bytes = 0
            self._blocks.cache.clear()

    def _install(self, wanted: Mapping[str, str]) -> None:
        """Swap the sites whose option changed."""
        for site in self.space.sites:
            option = wanted[site.name]
            if option == self._current[site.name]:
                continue
            if site.choices:
                choice_at(self.model, site.name).select(option.removeprefix(OPERATION))
            elif site.cache is not None:
                self._pack_cache(site, site.cache, option)
            elif site.is_structure:
                self._gates[site.name].replacement = self._replacement(site, option)
            elif site.written_back:
                self._set_parameters(site, option)
            else:
                self._set_layers(site, option)
            self._current[site.name] = option

    def _pack_cache(self, site: Site, cached: Cached, option: str) -> None:
        if site.name in self._packings:
            self._packings.pop(site.name).remove()
        if option != KEEP:
            packing = pack_cache(self.model, attention_of(site), cached, parse_option(option))
            self._packings[site.name] = packing

    def _replacement(self, site: Site, option: str) -> nn.Module | None:
        """What runs in the place of a sub-block."""
        if option == KEEP:
            return None
        if option == DROP:
            return Dropped(site, self.model.get_submodule(site.name)).eval()
        return self._store.replacement(site, option, self._untouched)

    def _set_layers(self, site: Site, option: str) -> None:
        paths = [member.module for member in site.members]
        layers, vectors = [self._layers[path] for path in paths], self._norm_vectors(site)
        if option != DENSE:
            found = self._store.get(site, option, [self._biases[path] for path in paths])
            layers, vectors = found.layers, vectors | found.parameters
        for path, layer in zip(paths, layers, strict=True):
            self.model.set_submodule(path, layer)
        for path, tensor in vectors.items():
            set_parameter(self.model, path, tensor)

    def _norm_vectors(self, site: Site) -> dict[str, Tensor]:
        """The dense vectors of the norm that an option of a site may change."""
        return {path: self._parameters[path] for path in (site.norm.paths if site.norm else ())}

    def _set_parameters(self, site: Site, option: str) -> None:
        paths = {member.parameter_path for member in site.members}
        values = {path: self._parameters[path] for path in paths}
        if option != DENSE:
            values = self._store.parameters(site, option, values)
        for path, tensor in values.items():
            set_parameter(self.model, path, tensor)


def _modules(site: Site) -> list[str]:
    if site.cache is not None:
        return [attention_of(site)]
    return [site.name] if site.is_structure else [member.module for member in site.members]


def _check_prediction(output: Any, chunk: Chunk) -> None:
    vocabulary = main_tensor(output).shape[-1]
    sums, weights = negative_log_likelihood(output, chunk.batch)
    loss = float(sums.sum() / weights.sum())
    if not loss < math.log(vocabulary):
        raise InvalidInput(
            f"model.source: the dense model's loss, {loss:.2f} nats a token, is not below chance "
            f"(ln {vocabulary} = {math.log(vocabulary):.2f}): weights, tokenizer and data do not "
            "fit each other"
        )
