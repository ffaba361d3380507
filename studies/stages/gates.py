"""The scores of gates that options `cP%:taylor` need: one file of the cache for a space."""

from pathlib import Path

from apportion.hashing import content_hash
from apportion.spaces.gates import gate_scores
from apportion.spaces.space import Space
from apportion.spaces.statistics import GATES, write_gates
from apportion.studies.context import Context
from apportion.studies.evaluations import Stopped
from apportion.studies.specification import StudySpec

# Of one backward pass, which holds the activations of the whole model; but at least one window.
TOKENS_AT_ONCE = 512
# Raise it when the same data give other scores.
GATES_VERSION = 1


def windows_at_once(spec: StudySpec) -> int:
    """Windows of one backward pass over text."""
    return max(1, TOKENS_AT_ONCE // (spec.data.context or 1))


class Gates:
    """The scores of the structure sites that have an option `taylor`; nothing where none has."""

    def __init__(self, context: Context, space: Space) -> None:
        self.context = context
        self.sites = space.gated_sites

    @property
    def files(self) -> dict[str, Path]:
        """The file of each site's, as `StatisticsFiles` takes it."""
        return {f"{site.name}{GATES}": self.path for site in self.sites}

    @property
    def path(self) -> Path:
        """The file, named by what its scores are of."""
        opened, data = self.context.opened, self.context.samples("calibration").hash
        widths = [[site.name, site.width and site.width.to_json()] for site in self.sites]
        made_from = [opened.revision, self.context.spec.model.dtype, data, widths]
        name = content_hash([GATES_VERSION, *made_from])
        return self.context.home.cache / f"gates-{name}.safetensors"

    def collect(self) -> None:
        """Make the file where it is not there and something needs it.

        Raises:
            InvalidInput: a model, or calibration data, without gradients that can be used.
            Stopped: the user asked to stop.
        """
        if not self.sites or self.path.is_file():
            return
        chunks = self.context.samples("calibration").chunks(windows_at_once(self.context.spec))
        with self.context.display.stage("calibrate") as bar:

            def progress(done: int) -> None:
                if self.context.stop.is_set():
                    raise Stopped
                bar.update(done, len(chunks), "")

            batches = (chunk.batch for chunk in chunks)
            write_gates(self.path, gate_scores(self.context.model, self.sites, batches, progress))
            windows = sum(chunk.windows for chunk in chunks)
            count = f"{len(self.sites)} sub-block{'' if len(self.sites) == 1 else 's'}"
            bar.end(f"gradients of {count} on {windows:,} windows")
