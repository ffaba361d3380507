"""Judging a round: held-out losses, measured latencies, and what of the front is exported."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from apportion.search.problem import Config
from apportion.studies.context import Context, Output
from apportion.studies.database.rows import Evaluation
from apportion.studies.evaluations import Runner
from apportion.studies.notes import notes_of, start_notes
from apportion.studies.points import by_size, option_of, point_of, uniform_of
from apportion.studies.pricing import Prices, latency_kind
from apportion.studies.stages import confirm
from apportion.studies.stages.confirm import PART, Judged
from apportion.studies.stages.search import Candidate, best_rival, front, winner
from apportion.studies.whole_models import Times, Update, WholeModels
from apportion.workers.pool import Evaluate


@dataclass
class Judging:
    """What one round's candidates are held to.

    Attributes:
        profiled: the profile stage's output.
        index: site -> option -> entry of the bank; `index_file` holds the same.
        final: no further round may follow: what breaks a limit cannot win.
    """

    context: Context
    prices: Prices
    profiled: Output
    index: dict[str, dict[str, str]]
    runner: Runner
    candidates: Sequence[Candidate]
    index_file: Path
    final: bool

    @cached_property
    def kinds(self) -> list[str]:
        """The limited kinds of cost."""
        return [limit.kind for limit in self.context.spec.parsed_limits]

    @cached_property
    def documents(self) -> Any:
        """[windows] of which document a held-out window is; None: not known."""
        documents = self.context.samples(PART).documents
        return None if documents is None else np.asarray(documents)

    def run(self) -> Output:
        """Judge, and describe what was found as the report."""
        won = winner(self.candidates)
        rival = best_rival(self.candidates, won, self.kinds)
        chosen = confirm.to_confirm(
            front(self.candidates, self.kinds), won, rival, self._uniforms()
        )
        with self.context.display.stage("confirm") as bar:
            evaluations = self._held_out([c for c, _ in chosen], bar.update)
            whole = WholeModels(self.context, self.prices, self.profiled, self.index_file)
            measured = whole.times([c.config for c, _ in chosen], bar.update)
            timed = {id(m) for times in measured.values() for m in times.values()}
            bar.end(
                f"{len(chosen)} configurations on held-out data, "
                f"{len(timed)} distinct programs timed end to end"
            )
        judged = [
            Judged(
                candidate,
                evaluations[candidate.config],
                confirm.held_out_loss(evaluations[candidate.config], self.documents),
                self._latencies(candidate, measured),
                labels,
            )
            for candidate, labels in chosen
        ]
        return self._verdict(judged)

    def _uniforms(self) -> dict[str, Candidate]:
        """uniform(o) without drops; those that the search did not score are numbered below 0."""
        scored = {candidate.config: candidate for candidate in self.candidates}
        problem = self.prices.problem(self.context.spec.parsed_limits, {})
        return {
            option: scored.get(config)
            or Candidate(
                -number,
                config,
                float("nan"),
                self.prices.costs(config),
                f"uniform:{option}",
                problem.feasible(config),
            )
            for number, (option, config) in enumerate(self.prices.uniform.items(), 1)
        }

    def _held_out(
        self, candidates: Sequence[Candidate], update: Update
    ) -> dict[Config, Evaluation]:
        windows = self.context.samples(PART).windows
        naming = self.context.naming(self.index)
        keys: dict[str, Config] = {}
        work = []
        for candidate in candidates:
            configuration = self.prices.space.configuration(candidate.config)
            key = naming.key(configuration, PART, 0, windows)
            keys[key] = candidate.config
            work.append((key, Evaluate(configuration, PART, 0, windows)))
        self.context.store.use_evaluations(self.context.lease, keys)
        found = {}
        for done, (key, evaluation) in enumerate(self.runner.run(work), 1):
            found[keys[key]] = evaluation
            update(done, len(work), "held-out data")
        return found

    def _latencies(
        self, candidate: Candidate, measured: Times
    ) -> dict[str, dict[str, float | None]]:
        latencies: dict[str, dict[str, float | None]] = {}
        for device in self.prices.tables:
            found = measured.get(device, {}).get(candidate.config)
            dense_ms = None if found is None else found.reference_milliseconds
            latencies[device] = {
                "predicted": candidate.costs[latency_kind(device)],
                "measured": None if found is None else found.milliseconds,
                "ratio": None if found is None else found.ratio,
                "low": None if found is None else found.low,
                "high": None if found is None else found.high,
                "dense": dense_ms,
            }
        return latencies

    def _limits(self, judged: Sequence[Judged]) -> dict[str, tuple[float, dict[str, float]]]:
        """Kind -> (the limit's value, device -> the limit as a ratio to the dense model).

        A limit in units of a configuration that was measured here is a multiple of the upper end
        of that measurement.
        """
        by_config = {j.candidate.config: j for j in judged}
        found: dict[str, tuple[float, dict[str, float]]] = {}
        for limit in self.context.spec.parsed_limits:
            ratios: dict[str, float] = {}
            for device, profile_ in self.profiled["profiles"].items():
                if limit.kind == latency_kind(device):
                    value, dense = self.prices.limit_value(limit), profile_["dense_ms"]
                    ratios[device] = value / dense
                    unit = limit.unit and by_config.get(self.prices.unit(limit.unit))
                    measured = unit and unit.latency_ms[device]["high"]
                    if measured and limit.factor:
                        ratios[device] = limit.factor * measured
                elif limit.kind == "latency.worst":
                    ratios[device] = self.prices.limit_value(limit)
            found[limit.kind] = (self.prices.limit_value(limit), ratios)
        return found

    def _broken(self, judged: Judged, limits: Mapping[str, Any]) -> dict[str, float]:
        """Kind -> measured / limit, where even the low end of the measurement is above."""
        found: dict[str, float] = {}
        for kind, (_, ratios) in limits.items():
            for device, limit in ratios.items():
                low, ratio = (judged.latency_ms[device][k] for k in ("low", "ratio"))
                if low is not None and ratio is not None and low > limit:
                    found[kind] = max(found.get(kind, 0.0), ratio / limit)
        return found

    def _verdict(self, judged: Sequence[Judged]) -> Output:
        limits = self._limits(judged)
        broken = self._broken(next(j for j in judged if "winner" in j.labels), limits)
        won, notes = self._decided(judged, limits)
        rival = next((j for j in judged if "rival" in j.labels), None)
        on_front = [j for j in judged if {"front", "winner"} & set(j.labels) or j is won]
        space = self.prices.space
        compressed = self.context.store.stage_output(self.context.study_id, "compress") or {}
        return {
            "winner": won.candidate.number,
            "winner_config": list(won.candidate.config),
            "rival": option_of(rival),
            "front": by_size(point_of(j, space) for j in on_front),
            "uniform": by_size(
                uniform_of(j, won, space, self.documents) for j in _uniforms_of(judged)
            ),
            "limits": {
                kind: {"value": value, "ratio": ratios} for kind, (value, ratios) in limits.items()
            },
            "broken": {} if self.final else broken,
            "notes": [
                *notes,
                *start_notes(self.candidates),
                *notes_of(space, self.profiled, compressed),
            ],
            "clustered_by": "document" if won.loss.by_document else "window",
        }

    def _decided(
        self, judged: Sequence[Judged], limits: Mapping[str, Any]
    ) -> tuple[Judged, list[str]]:
        """What is exported, and why where it is not the search winner.

        Where the winner breaks a limit and a round may follow, that round decides.
        """
        won = next(j for j in judged if "winner" in j.labels)
        notes: list[str] = []
        if self._broken(won, limits):
            if not self.final:
                return won, notes
            kept = [j for j in judged if j.candidate.feasible and not self._broken(j, limits)]
            if kept:
                won = min(kept, key=lambda j: (j.candidate.loss, j.candidate.number))
                notes.append(
                    "the search winner broke a limit when measured; the best that keeps "
                    "it is chosen"
                )
            else:
                notes.append("no configuration was measured within the limits")
        inside = [j for j in _uniforms_of(judged) if not self._broken(j, limits)]
        better = confirm.replacement(won, inside, self.documents)
        if better is not None:
            won = better
            notes.append(
                "a uniform configuration was significantly better on held-out data "
                "and is chosen in the search winner's place"
            )
        return won, notes


def _uniforms_of(judged: Sequence[Judged]) -> list[Judged]:
    return [j for j in judged if option_of(j) is not None]
