"""Times of whole models: configurations that run on the devices of a study that are here."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from apportion.cost_models.fingerprint import fingerprint_hash
from apportion.cost_models.harness import Measurement
from apportion.errors import InvalidInput
from apportion.search.problem import Config
from apportion.studies.context import Context, Output, worker_spec
from apportion.studies.pricing import Prices
from apportion.studies.specification.sections import Device
from apportion.studies.stages import profile

MODEL_SECONDS = 1.0
Update = Callable[[int, int, str], None]
Times = dict[str, dict[Config, Measurement]]
"""Device -> configuration -> its whole model's time."""


@dataclass(frozen=True)
class WholeModels:
    """Times whole models of one study.

    Attributes:
        profiled: the profile stage's output.
        index_file: of the bank's entries by site and option.
    """

    context: Context
    prices: Prices
    profiled: Output
    index_file: Path

    def times(self, configs: Sequence[Config], update: Update) -> Times:
        """The time of each, on each device that is here.

        Raises:
            InvalidInput: a device of a cluster is another machine than the one profiled.
        """
        devices = {n: d for n, d in self.context.spec.devices.items() if d.kind == "cpu"}
        return {n: self._times_on(n, device, configs, update) for n, device in devices.items()}

    def _times_on(
        self, name: str, device: Device, configs: Sequence[Config], update: Update
    ) -> dict[Config, Measurement]:
        programs = [self._program(name, config) for config in configs]
        configurations = {
            str(programs.index(program)): {
                "configuration": self.prices.space.configuration(config),
                "implementations": self.profiled["profiles"][name]["implementations"],
            }
            for program, config in zip(programs, configs, strict=True)
        }
        update(0, 1, f"timing {len(configurations)} whole models on '{name}'")
        threads = device.threads or 1
        self._refuse_another(name, threads)
        job = {
            "kind": "compare",
            "worker": worker_spec(self.context.spec, self.context.home, self.index_file),
            "request": profile.request_of(device),
            "seconds": MODEL_SECONDS,
            "seed": self.context.spec.study.seed,
            "configurations": configurations,
        }
        times = profile.timed(self.context, name, job, threads, lambda message: None, update)
        measured = {place: Measurement.from_json(found) for place, found in times.items()}
        return {
            config: measured[str(programs.index(program))]
            for program, config in zip(programs, configs, strict=True)
        }

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

    def _program(self, device: str, config: Config) -> tuple[float, ...]:
        """What runs, as the row of every site: equal rows stem from the same measured operator.

        Configurations that run the same operators are the same program and are timed once: between
        two builds of one program timings differ by more than within one, which would let a
        configuration break a limit that is its own.
        """
        rows, space = self.prices.tables[device].rows, self.prices.space
        by_time = [not (site.choices or site.cache) for site in space.sites]
        # Alternatives of a choice block and caches are programs of their own, of equal time or not.
        return tuple(
            -1.0
            if space.void(config, place)
            else float(rows[place, option] if by_time[place] else option)
            for place, option in enumerate(config)
        )
