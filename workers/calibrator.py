"""Calibration as work: the statistics of one block, by any worker.

Each worker makes forward passes of its own, up to the block that it is handed, and goes on from
there with the next: no activations are sent. So of `n` workers each runs the whole forward, and
what is shared is the rest, the second moments. Handed out in the order of the blocks, each block is
run once by each worker, if none is lost.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from apportion.errors import InvalidInput
from apportion.spaces.activations import Activations
from apportion.spaces.chain import NoChain
from apportion.spaces.statistics import write_statistics
from apportion.spaces.streaming import Step, Walk
from apportion.workers.realizer import Realization, Realize, Realizer
from apportion.workers.spec import (
    Origin,
    Setting,
    WorkerSpec,
    cache_folder,
    open_beside_others,
    origin_of,
)

# Rows of a batch are summed in float32: with another number the statistics are others.
CALIBRATION_BATCH = 16


@dataclass(frozen=True)
class Collect:
    """The work: the statistics of one block.

    Attributes:
        step: what is collected, and where it stands in the chain of blocks.
        file: where it is written, as the driver's machine names it.
    """

    step: Step
    file: str

    @property
    def size(self) -> int:
        """One block."""
        return 1

    def failed(self, reason: str, seconds: float, error_class: str) -> "Collected":
        """That it was not collected."""
        block = self.step.portion.block
        told = "what lies outside of blocks" if block is None else f"block {block}"
        return Collected(seconds, failure=f"{told} is not calibrated: {reason}")


@dataclass(frozen=True)
class Collected:
    """What came of it.

    Attributes:
        seconds: wall time.
        failure: why there are no statistics, in one line, or None.
        error: what was wrong, where it is the user's to mend.
        no_chain: why the model cannot be run block by block; None: this block could be.
        tokens: the most that entered a site.
        origin: where the file is beside the bank, if that is another than the driver's.
    """

    seconds: float
    failure: str | None = None
    error: InvalidInput | OSError | None = None
    no_chain: str | None = None
    tokens: int = 0
    origin: Origin | None = None


class Calibrator:
    """One resident dense model that is walked through block by block."""

    def __init__(self, setting: Setting, spec: WorkerSpec) -> None:
        """Takes a model with its data.

        Args:
            setting: opened from `spec`; the model stays dense.
            spec: says where statistics and activations are kept.
        """
        self._setting = setting
        self._spec = spec
        self._walk: Walk | None = None

    def collect(self, work: Collect) -> Collected:
        """Collect and write the statistics of a block."""
        began = time.perf_counter()
        if self._walk is None:
            self._walk = self._begin()
        # The file has its name on every node: it is named by what the statistics are of.
        file = cache_folder(self._spec) / Path(work.file).name
        try:
            sums = self._walk.collect(work.step)
            write_statistics(file, sums)
        except NoChain as error:
            return Collected(time.perf_counter() - began, str(error), no_chain=str(error))
        except (InvalidInput, OSError) as error:  # trying once more would not help
            return Collected(time.perf_counter() - began, str(error), error)
        tokens = max((found.tokens for found in sums.values()), default=0)
        seconds = time.perf_counter() - began
        return Collected(seconds, tokens=tokens, origin=origin_of(self._spec))

    def forget(self) -> None:
        """Keep no activations and no data any more."""
        self._walk = None

    def _begin(self) -> Walk:
        chunks = self._setting.open_part("calibration").chunks(CALIBRATION_BATCH)
        folder = cache_folder(self._spec)
        folder.mkdir(parents=True, exist_ok=True)
        batches = [chunk.batch for chunk in chunks]
        model, blocks = self._setting.opened.model, self._setting.blocks
        return Walk(model, blocks, batches, Activations(folder))


def build_compressor(
    spec: WorkerSpec,
) -> Callable[[Collect | Realize], Collected | Realization]:
    """What calibrates and realizes in a process that is not the machine's only one.

    Raises:
        InvalidInput: something that the specification names is not there, or does not fit.
    """
    setting = open_beside_others(spec)
    calibrator, realizer = Calibrator(setting, spec), Realizer(setting, spec)

    def do(work: Collect | Realize) -> Collected | Realization:
        if isinstance(work, Collect):
            return calibrator.collect(work)
        calibrator.forget()
        return realizer.realize(work)

    return do
