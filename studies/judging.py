"""Judging a round: held-out losses, measured latencies, and what of the front is exported."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean
from typing import Any

import numpy as np

from apportion.cost_models.fingerprint import fingerprint_hash
from apportion.cost_models.harness import Measurement
from apportion.errors import InvalidInput
from apportion.spaces.grammar import Option
from apportion.spaces.parts import kept_share
from apportion.studies.context import Context, Output, worker_spec
from apportion.studies.database.rows import Evaluation
from apportion.studies.evaluations import Runner
from apportion.studies.pricing import Prices, latency_kind
from apportion.studies.stages import confirm, profile
from apportion.studies.stages.confirm import PART, Judged
from apportion.studies.stages.search import Candidate, best_rival, front, winner
from apportion.workers.pool import Evaluate

MODEL_SECONDS = 1.0


@dataclass
class Judging:
    """What one round's candidates are held to.

    Attributes:
        profiled: the profile stage's output.
        index: site -> option -> entry of the bank.
        final: no further round may follow: what breaks a limit cannot win.
    """

    context: Context
    prices: Prices
    profiled: Output
    index: dict[str, dict[str, str]]
    runner: Runner
    candidates: Sequence[Candidate]
    index_file: Any
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
            measured = self._measured([c for c, _ in chosen], bar.update)
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
        self, candidates: Sequence[Candidate], update: Any
    ) -> dict[tuple[int, ...], Evaluation]:
        windows = self.context.samples(PART).windows
        naming = self.context.naming(self.index)
        keys: dict[str, tuple[int, ...]] = {}
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

    def _measured(
        self, candidates: Sequence[Candidate], update: Any
    ) -> dict[str, dict[tuple[int, ...], Measurement]]:
        """Device -> configuration -> its whole model's time, for devices that are here."""
        by_device = {}
        devices = {n: d for n, d in self.context.spec.devices.items() if d.kind == "cpu"}
        for name, device in devices.items():
            implementations = self.profiled["profiles"][name]["implementations"]
            programs = [self._program(name, candidate) for candidate in candidates]
            configurations = {
                str(programs.index(program)): {
                    "configuration": self.prices.space.configuration(candidate.config),
                    "implementations": implementations,
                }
                for program, candidate in zip(programs, candidates, strict=True)
            }
            update(0, 1, f"timing {len(configurations)} whole models on '{name}'")
            self._refuse_another(name, device.threads or 1)
            job = {
                "kind": "compare",
                "worker": worker_spec(self.context.spec, self.context.home, self.index_file),
                "request": profile.request_of(device),
                "seconds": MODEL_SECONDS,
                "seed": self.context.spec.study.seed,
                "configurations": configurations,
            }
            times = profile.timed(
                self.context, name, job, device.threads or 1, lambda message: None, update
            )
            measured = {place: Measurement.from_json(found) for place, found in times.items()}
            by_device[name] = {
                candidate.config: measured[str(programs.index(program))]
                for program, candidate in zip(programs, candidates, strict=True)
            }
        return by_device

    def _refuse_another(self, name: str, threads: int) -> None:
        """Raises InvalidInput where a cluster has the device in another place than before."""
        if self.context.cluster is None:
            return
        found = profile.fingerprint_of(self.context, name, threads)
        profiled = self.profiled["profiles"][name]["fingerprint"]
        if fingerprint_hash(found) != fingerprint_hash(profiled):
            raise InvalidInput(
                f"devices.{name}: it is another machine than the one that was profiled "
                f"({found['cpu']}, {found['cores']} cores; then {profiled['cpu']}, "
                f"{profiled['cores']} cores); give that node the resource again"
            )

    def _program(self, device: str, candidate: Candidate) -> tuple[float, ...]:
        """What runs, as the row of every site: equal rows stem from the same measured operator.

        Configurations that run the same operators are the same program and are timed once: between
        two builds of one program timings differ by more than within one, which would let a
        configuration break a limit that is its own.
        """
        rows, space = self.prices.tables[device].rows, self.prices.space
        # Alternatives of a choice block are programs of their own, of equal time or not.
        return tuple(
            -1.0
            if space.void(candidate.config, place)
            else float(option if space.sites[place].choices else rows[place, option])
            for place, option in enumerate(candidate.config)
        )

    def _latencies(
        self, candidate: Candidate, measured: Mapping[str, Mapping[tuple[int, ...], Measurement]]
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
        won = next(j for j in judged if "winner" in j.labels)
        rival = next((j for j in judged if "rival" in j.labels), None)
        notes: list[str] = []
        broken = self._broken(won, limits)
        if broken and self.final:
            kept = [j for j in judged if j.candidate.feasible and not self._broken(j, limits)]
            if kept:
                won = min(kept, key=lambda j: (j.candidate.loss, j.candidate.number))
                notes.append(
                    "the search winner broke a limit when measured; the best that keeps "
                    "it is chosen"
                )
            else:
                notes.append("no configuration was measured within the limits")
        baselines = [j for j in judged if any(label.startswith("uniform:") for label in j.labels)]
        if not broken or self.final:
            inside = [j for j in baselines if not self._broken(j, limits)]
            better = confirm.replacement(won, inside, self.documents)
            if better is not None:
                won = better
                notes.append(
                    "a uniform configuration was significantly better on held-out data "
                    "and is chosen in the search winner's place"
                )
        return {
            "winner": won.candidate.number,
            "winner_config": list(won.candidate.config),
            "rival": _option_of(rival),
            "front": _by_size(
                self._point(j) for j in judged if {"front", "winner"} & set(j.labels) or j is won
            ),
            "uniform": _by_size(self._uniform(j, won) for j in baselines),
            "limits": {
                kind: {"value": value, "ratio": ratios} for kind, (value, ratios) in limits.items()
            },
            "broken": {} if self.final else broken,
            "notes": [*notes, *self._unreached(), *self._without_credit()],
            "clustered_by": "document" if won.loss.by_document else "window",
        }

    def _unreached(self) -> list[str]:
        """That weights were compressed without statistics of their inputs, in a line."""
        compressed = self.context.store.stage_output(self.context.study_id, "compress") or {}
        names = compressed.get("unreached", ())
        if not names:
            return []
        weights = "1 weight" if len(names) == 1 else f"{len(names)} weights"
        return [
            f"no calibration data entered {weights}, {names[0]} for one: compressed by themselves, "
            "rounded to nearest"
        ]

    def _without_credit(self) -> list[str]:
        """Options that run dense on a device, and options that were struck, in a line each."""
        sites = len(self.prices.space.weight_sites)
        lines = []
        for name, found in self.profiled["profiles"].items():
            counts = Counter(text for texts in found["uncredited"].values() for text in texts)
            if counts:
                lines.append(f"no latency credit on '{name}', runs dense: {_shares(counts, sites)}")
        struck = Counter(text for texts in self.profiled["struck"].values() for text in texts)
        if struck:
            lines.append(f"struck, neither smaller nor faster than dense: {_shares(struck, sites)}")
        return lines

    def _point(self, judged: Judged) -> dict[str, Any]:
        candidate, space = judged.candidate, self.prices.space
        options = [
            (site, space.options[place][choice])
            for place, (site, choice) in enumerate(zip(space.sites, candidate.config, strict=True))
        ]
        dropped: dict[str, int] = {}
        widths: list[float] = []
        for site, option in options:
            if option.drops:
                dropped[site.kind] = dropped.get(site.kind, 0) + 1
            if site.width is not None and option.narrows:
                widths.append(kept_share(site.width, option))
        loss = judged.loss
        return {
            "number": candidate.number,
            "origin": candidate.origin,
            "loss_search": _known(candidate.loss),
            "loss_heldout": _known(loss.mean),
            "loss_error": _known(loss.error),
            "weight_bytes": round(candidate.costs["weight_bytes"]),
            "resident_bytes": round(candidate.costs["resident_bytes"]),
            "bits": candidate.costs["bits"],
            "latency_ms": judged.latency_ms,
            "sparsity": self._mean_share(candidate, _zeros),
            "rank": self._mean_share(candidate, _kept_by_rank),
            "width": fmean(widths) if widths else 0.0,
            "dropped": dropped,
            "configuration": space.configuration(candidate.config),
        }

    def _mean_share(self, candidate: Candidate, share: Any) -> float:
        """The weighted mean over remaining weight sites that have such a share at all."""
        space = self.prices.space
        total = found = 0.0
        for place in space.weight_sites:
            if space.void(candidate.config, place):
                continue
            value = share(space.options[place][candidate.config[place]])
            weights = space.sites[place].weights
            total += weights if share is _zeros or value else 0
            found += value * weights
        return found / total if total else 0.0

    def _uniform(self, judged: Judged, won: Judged) -> dict[str, Any]:
        found = confirm.difference(judged.evaluation, won.evaluation, self.documents)
        return {
            **self._point(judged),
            "option": _option_of(judged) or "",
            "difference": _known(found.mean),
            "standard_error": _known(found.error),
        }


def _shares(counts: Mapping[str, int], sites: int) -> str:
    """ "s60%, r50% (6 of 24 sites)"."""
    return ", ".join(
        text if count == sites else f"{text} ({count} of {sites} sites)"
        for text, count in counts.items()
    )


def _by_size(points: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The largest first; of equal sizes the slowest."""

    def order(point: dict[str, Any]) -> tuple[int, float]:
        return -point["weight_bytes"], -sum(t["predicted"] for t in point["latency_ms"].values())

    return sorted(points, key=order)


def _option_of(judged: Judged | None) -> str | None:
    if judged is None:
        return None
    labels = [label for label in judged.labels if label.startswith("uniform:")]
    return labels[0].removeprefix("uniform:") if labels else None


def _known(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _zeros(option: Option) -> float:
    if isinstance(option.sparsity, tuple):
        kept, of = option.sparsity
        return 1 - kept / of
    return float(option.sparsity) / 100 if option.sparsity else 0.0


def _kept_by_rank(option: Option) -> float:
    return float(option.rank_percent) / 100 if option.rank_percent else 0.0
