"""All that a fresh process needs to become a worker, as JSON."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import torch

from apportion.errors import InvalidInput
from apportion.spaces.bank import Bank
from apportion.spaces.batches import Batch, call, main_tensor, no_gradients
from apportion.spaces.caches import named_caches
from apportion.spaces.discovery import discover
from apportion.spaces.entries import Entry, build_space
from apportion.spaces.sites import Site
from apportion.spaces.space import Space
from apportion.workers import user_code
from apportion.workers.evaluator import Budgets, Evaluate, Evaluation, Evaluator
from apportion.workers.objectives import Objective, open_objective
from apportion.workers.realized import Index, RealizedStore
from apportion.workers.samples import Part, Samples
from apportion.workers.shared_weights import share_weights
from apportion.workers.sources import OpenedModel, open_data, open_model


class Origin(TypedDict):
    """Where the bank's entries come from that a node of a cluster lacks.

    Keys:
        node: Ray's id of the driver's node.
        bank: the bank's folder there.
    """

    node: str
    bank: str


class WorkerSpec(TypedDict):
    """What a worker is made of.

    Keys:
        source, dtype, trust_remote_code: the model, resolved.
        data, seed: `[data]`, and what shuffles its windows.
        objective: the loss.
        threads: threads of an evaluation.
        batch: windows of a forward pass.
        space: for each entry the fields of `spaces.space.Entry`.
        rank_multiple: what ranks are rounded down to.
        bank: its folder.
        index: a JSON file, site -> option -> key of the bank's entry.
        base: the folder that relative paths start from.
        budgets: bytes of each cache (`Budgets`); what is left out has its default.
        origin: of what the bank lacks; left out where the bank is whole.
    """

    source: str
    dtype: str
    trust_remote_code: bool
    data: dict[str, Any]
    seed: int
    objective: str
    threads: int
    batch: int
    space: list[list[Any]]
    rank_multiple: int
    bank: str
    index: str
    base: str
    budgets: dict[str, int]
    origin: NotRequired[Origin]


@dataclass(frozen=True)
class Setting:
    """A model with its space and its data, opened from a specification."""

    opened: OpenedModel
    sites: tuple[Site, ...]
    space: Space
    objective: Objective
    open_part: Callable[[Part], Samples]
    sample: Batch

    @property
    def blocks(self) -> list[Site]:
        """The model's blocks, in the space or not."""
        return [site for site in self.sites if site.kind == "block"]


def open_setting(spec: WorkerSpec) -> Setting:
    """Load model, data and space; the sample is one forward pass on one window.

    Raises:
        InvalidInput: something that the specification names is not there, or does not fit.
    """
    base = Path(spec["base"])
    opened = open_model(spec["source"], spec["dtype"], base, spec["trust_remote_code"])
    objective = open_objective(spec["objective"], base)

    def open_part(part: Part) -> Samples:
        return open_data(spec["data"], part, opened.tokenizer, base, spec["seed"])

    sample = objective.inputs(open_part("search").chunks(1)[0].batch)
    _try(opened, sample)
    sites = discover(opened.model, sample).sites
    entries = [_entry(fields) for fields in spec["space"]]
    if (caches := named_caches(opened.model, sample, sites, entries)) is not None:
        sites = caches.among(sites)
    space = build_space(sites, entries, spec["rank_multiple"])
    return Setting(opened, sites, space, objective, open_part, sample)


@no_gradients()
def _try(opened: OpenedModel, sample: Batch) -> None:
    """Run the model once. Raises InvalidInput with what it raised, and where in the user's file."""
    try:
        output = call(opened.model, sample)
    except user_code.RAISED as error:
        told = user_code.raised(error, user_code.file_of(opened.source))
        raise InvalidInput(f"model.source: the model, run on one window of data, {told}") from error
    try:
        main_tensor(output)
    except TypeError as error:
        raise InvalidInput(
            f"model.source: the model returns {type(output).__name__}, not a tensor, a tuple or "
            "mapping that begins with one, or an output with .logits"
        ) from error


def build_evaluator(spec: WorkerSpec) -> Evaluator:
    """Make an evaluator, and set this process's number of torch threads.

    Raises:
        InvalidInput: something that the specification names is not there, or does not fit.
        OSError: the index cannot be read.
    """
    torch.set_num_threads(spec["threads"])
    return _evaluator(spec, open_setting(spec))


def build_beside_others(spec: WorkerSpec) -> Callable[[Evaluate], Evaluation]:
    """What evaluates in a process that is not the machine's only one.

    Raises:
        InvalidInput, OSError: like `build_evaluator`.
    """
    return _evaluator(spec, open_beside_others(spec)).evaluate


def open_beside_others(spec: WorkerSpec) -> Setting:
    """`open_setting` in such a process: weights are there once for all. Raises InvalidInput."""
    torch.set_num_threads(spec["threads"])
    setting = open_setting(spec)
    share_weights(setting.opened.model, cache_folder(spec))
    return setting


def cache_folder(spec: WorkerSpec | Origin) -> Path:
    """Where what can be made or fetched again is kept, beside the bank."""
    return Path(spec["bank"]).with_name("cache")


def origin_of(spec: WorkerSpec) -> Origin | None:
    """Where the bank is that this worker fills; None: it is the driver's."""
    if "origin" not in spec or spec["bank"] == spec["origin"]["bank"]:
        return None
    import ray

    return Origin(node=ray.get_runtime_context().get_node_id(), bank=spec["bank"])


def open_bank(spec: WorkerSpec) -> Bank:
    """The bank; what it lacks is fetched from the specification's origin."""
    from apportion.workers.bank_fetching import fetcher

    return Bank(Path(spec["bank"]), fetcher(spec["origin"]) if "origin" in spec else None)


def _evaluator(spec: WorkerSpec, setting: Setting) -> Evaluator:
    budgets = Budgets(**spec["budgets"])
    return Evaluator(
        setting.opened,
        setting.space,
        setting.blocks,
        RealizedStore(open_bank(spec), read_index(spec), budgets.realized),
        setting.objective,
        setting.open_part,
        chunk_windows=spec["batch"],
        budgets=budgets,
    )


def read_index(spec: WorkerSpec) -> Index:
    """Site -> option -> key of the bank's entry. Raises OSError."""
    index: Index = json.loads(Path(spec["index"]).read_text())
    return index


def _entry(fields: Sequence[Any]) -> Entry:
    sites, options, *rest = fields
    return Entry(tuple(sites), tuple(options), *rest)
