"""What an option costs and loses everywhere in the shipped model; each is evaluated once."""

import json
from collections.abc import Iterable
from statistics import fmean
from typing import Any

import numpy as np
import torch
from _report import HOME, ROOT, code
from numpy.typing import NDArray
from torch import Tensor

from apportion.files import write_whole
from apportion.hashing import content_hash
from apportion.kernels.formats import StoredWeight
from apportion.kernels.reference import reference_weight
from apportion.spaces.apply import member_weight
from apportion.spaces.bank import Bank
from apportion.spaces.calibration import collect
from apportion.spaces.compressors.compose import RANK_MULTIPLE, InputStatistics, realize
from apportion.spaces.grammar import parse_option
from apportion.spaces.sites import Site
from apportion.spaces.stored import StoredSite
from apportion.studies.specification import load
from apportion.workers.evaluator import Evaluate, Evaluator
from apportion.workers.realized import RealizedStore
from apportion.workers.samples import first_tensor
from apportion.workers.spec import WorkerSpec, open_setting

STUDY_FILE = ROOT / "examples" / "demo" / "study.toml"
SITES = ["*.self_attn.*", "*.mlp.*"]
THREADS = 1
MADE_BY = (
    *("spaces/compressors", "kernels/reference.py", "workers/objectives.py"),
    "benchmarks/shipped_options.py",
)
Row = dict[str, Any]


class ShippedOptions:
    """The shipped model, the statistics of its inputs, and what evaluates an option everywhere.

    Attributes:
        source: the model's folder.
        revision: a hash of what it holds.
        tokens: the calibration windows, int64 [windows, context].
        dense: float32 [out, in] of each layer.
        moments: of each layer's inputs in the dense model.
        documents: int64 [windows], of which document a held-out window is.
    """

    def __init__(self, options: Iterable[str]) -> None:
        """Takes every option that will be asked for."""
        torch.set_num_threads(THREADS)
        spec = _specification(options)
        setting = open_setting(spec)
        self._dtype = spec["dtype"]
        self._sites = [setting.space.sites[place] for place in setting.space.weight_sites]
        calibration, heldout = setting.open_part("calibration"), setting.open_part("heldout")
        model = setting.opened.model
        batches = [chunk.batch for chunk in calibration.chunks(spec["batch"])]
        sums = collect(model, self._sites, batches)
        members = [(site, member) for site in self._sites for member in site.members]
        self.source = setting.opened.source.removeprefix("hf:")
        self.revision = setting.opened.revision
        self.tokens: Tensor = torch.cat([first_tensor(batch) for batch in batches])
        self.dense = {m.module: member_weight(model, m).float().clone() for _, m in members}
        self.moments = {m.module: sums[site.name] for site, m in members}
        self._windows = heldout.windows
        self.documents: NDArray[np.int64] = np.array(heldout.documents)
        given = content_hash([self.revision, self._dtype, calibration.hash, heldout.hash])[:8]
        self._place = HOME / f"compressors-{code(*MADE_BY)}-{given}"
        self._bank = Bank(self._place / "bank")
        self._index: dict[str, dict[str, str]] = {site.name: {} for site in self._sites}
        store = RealizedStore(self._bank, self._index, 1 << 28)
        parts = (setting.space, setting.blocks, store, setting.objective, setting.open_part)
        self._evaluator = Evaluator(setting.opened, *parts, chunk_windows=spec["batch"])

    def row(self, option: str) -> Row:
        """What the option everywhere comes to.

        Keys: `bytes` of all layers, `bits` for each of their weights, `layer_errors`: by the last
        part of a layer's name, its mean over the blocks; `losses` and `weights` of the held-out
        windows, float64 [windows] each.
        """
        path = self._place / f"{content_hash(option)}.json"
        if not path.is_file():
            write_whole(path, json.dumps(self._evaluated(option)).encode())
        row: Row = json.loads(path.read_text())
        return row | {key: np.array(row[key]) for key in ("losses", "weights")}

    def _evaluated(self, option: str) -> Row:
        stored = {site.name: self._stored(site, option) for site in self._sites}
        configuration = dict.fromkeys(stored, option)
        done = self._evaluator.evaluate(Evaluate(configuration, "heldout", 0, self._windows))
        if done.losses is None or done.weights is None:
            raise SystemExit(f"{option}: {done.failure}")
        members = [each for site in stored.values() for each in site]
        size = sum(tensor.nbytes for _, each in members for tensor in each.tensors.values())
        errors: dict[str, list[float]] = {}
        for name, each in members:
            made = reference_weight(each).float()
            error = layer_error(self.dense[name], made, self.moments[name])
            errors.setdefault(name.rpartition(".")[2], []).append(error)
        return {
            "option": option,
            "bytes": size,
            "bits": 8 * size / sum(weight.numel() for weight in self.dense.values()),
            "layer_errors": {kind: fmean(found) for kind, found in errors.items()},
            "losses": done.losses.tolist(),
            "weights": done.weights.tolist(),
        }

    def _stored(self, site: Site, option: str) -> list[tuple[str, StoredWeight]]:
        """A site's layers by name under an option; the bank has them too."""
        parsed = parse_option(option)
        stored = [
            realize(
                self.dense[member.module],
                member.shape,
                parsed,
                self.moments[member.module],
                self._dtype,
                RANK_MULTIPLE,
            )
            for member in site.members
        ]
        key = self._index[site.name][option] = content_hash([site.name, option])
        self._bank.put(key, StoredSite(tuple(stored)))
        return [(member.module, each) for member, each in zip(site.members, stored, strict=True)]


def layer_error(dense: Tensor, made: Tensor, seen: InputStatistics) -> float:
    """tr(E M E^T) / tr(W M W^T) in float64: the share of a layer's output that is lost.

    Args:
        dense: W, [out, in].
        made: W + E, what a compressor made of it.
        seen: of the layer's inputs, M its second moment.
    """
    change, weight, moment = made.double() - dense.double(), dense.double(), seen.second_moment
    return float(((change @ moment) * change).sum() / ((weight @ moment) * weight).sum())


def _specification(options: Iterable[str]) -> WorkerSpec:
    """The demo's model and data, with these options for all layers of its blocks."""
    study = load(STUDY_FILE)
    return WorkerSpec(
        source=study.model.source,
        dtype=study.model.dtype,
        trust_remote_code=False,
        data=study.data.model_dump(mode="json", exclude_none=True),
        seed=study.study.seed,
        objective=study.objective.loss,
        threads=THREADS,
        batch=study.objective.batch,
        space=[[SITES, list(options)]],
        rank_multiple=RANK_MULTIPLE,
        bank="",
        index="",
        base=str(ROOT),
        budgets={},
    )
