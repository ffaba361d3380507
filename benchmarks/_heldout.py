"""Held-out losses of configurations that a study did not judge itself; each is evaluated once."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from _cells import reading

from apportion.files import write_whole
from apportion.hashing import content_hash
from apportion.studies.context import worker_spec
from apportion.studies.database.rows import Evaluation
from apportion.studies.database.store import Store
from apportion.studies.home import Home
from apportion.studies.specification import StudySpec
from apportion.workers.evaluator import Evaluate, Evaluator
from apportion.workers.spec import build_evaluator

Configuration = Mapping[str, str]
Index = dict[str, dict[str, str]]


def held_out(
    spec: StudySpec, place: Home, index: Index, configurations: Sequence[Configuration]
) -> list[Evaluation]:
    """Their losses on the held-out part, in order.

    Args:
        spec: of the study whose space holds them.
        index: site -> option -> entry of the bank.
    """
    context = reading(spec, place, Store.open(place.database))
    naming, windows = context.naming(index), context.samples("heldout").windows
    evaluator: Evaluator | None = None
    found = []
    for configuration in configurations:
        key = naming.key(configuration, "heldout", 0, windows)
        file = place.path / "heldout" / f"{key}.json"
        if not file.is_file():
            evaluator = evaluator or _evaluator(spec, place, index)
            write_whole(file, _evaluated(evaluator, configuration, windows))
        losses, weights = (np.array(each) for each in json.loads(file.read_text()))
        found.append(Evaluation(losses, weights, None, 0.0))
    return found


def _evaluator(spec: StudySpec, place: Home, index: Index) -> Evaluator:
    listed = place.cache / f"bank-{content_hash(index)}.json"
    write_whole(listed, json.dumps(index).encode())
    return build_evaluator(worker_spec(spec, place, Path(listed)))


def _evaluated(evaluator: Evaluator, configuration: Configuration, windows: int) -> bytes:
    done = evaluator.evaluate(Evaluate(dict(configuration), "heldout", 0, windows))
    if done.losses is None or done.weights is None:
        raise SystemExit(f"held-out data: {done.failure}")
    return json.dumps([done.losses.tolist(), done.weights.tolist()]).encode()
