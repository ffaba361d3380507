"""Calibration: in this process, or shared by block among the workers of a study."""

from collections.abc import Callable, Sequence
from pathlib import Path

from apportion.spaces.activations import Activations
from apportion.spaces.batches import Batch
from apportion.spaces.calibration import Sums
from apportion.spaces.chain import NoChain
from apportion.spaces.statistics import write_statistics
from apportion.spaces.streaming import Portion, steps, stream
from apportion.studies.cli.display import Stage
from apportion.studies.context import Context
from apportion.studies.evaluations import Stopped
from apportion.studies.filling import Compressors, checked
from apportion.studies.specification.defaults import physical_cores
from apportion.workers.bank_fetching import WORKER, fetch_to
from apportion.workers.calibrator import CALIBRATION_BATCH, Collect, Collected
from apportion.workers.spec import cache_folder

File = Callable[[Portion], Path]


def calibrate(
    context: Context, compressors: Compressors, wanted: Sequence[Portion], file: File
) -> None:
    """Collect the statistics that are not there; a finished block is whole and stays.

    They are the same to the last bit whoever collects them.

    Args:
        compressors: share the blocks (`is_shared`).
        wanted: what statistics there shall be.
        file: gives the file of a portion's.

    Raises:
        InvalidInput: calibration data that cannot be used.
        ApportionError: workers that cannot be kept alive, or a block that nobody could collect.
        OSError: the disk is full or the cache cannot be written.
        Stopped: the user asked to stop.
    """
    missing = [portion for portion in wanted if not file(portion).is_file()]
    if not missing:
        return
    batches = [chunk.batch for chunk in context.samples("calibration").chunks(CALIBRATION_BATCH)]
    tokens, reason = 0, None
    with context.display.stage("calibrate") as bar:
        if len(missing) > 1 and is_shared(context):
            tokens = _by_workers(context, compressors, missing, wanted, batches, file, bar)
        # All, if this process is alone. Else what workers left because the model is no chain.
        if left := [portion for portion in missing if not file(portion).is_file()]:
            more, reason = _here(context, left, wanted, batches, file, bar)
            tokens = max(tokens, more)
        unit = "tokens" if context.spec.data.is_text else "rows"
        told = f", all blocks at once: {reason}" if reason else ""
        bar.end(f"{tokens:,} {unit}{told}")


def is_shared(context: Context) -> bool:
    """Whether there are several workers, each with processors of its own.

    Each makes forward passes that one process makes once: where they have to take turns on the
    processors, sharing would take longer.
    """
    if context.workers == 1:
        return False
    # A node of a cluster takes as many workers as it was started with processors for.
    threads = context.workers * context.spec.objective.threads
    return context.cluster is not None or threads <= physical_cores()


def _here(
    context: Context,
    missing: Sequence[Portion],
    wanted: Sequence[Portion],
    batches: Sequence[Batch],
    file: File,
    bar: Stage,
) -> tuple[int, str | None]:
    """In this process; gives the most tokens that entered a site, and why blocks are no chain."""
    counts = [0]

    def keep(portion: Portion, sums: Sums) -> None:
        write_statistics(file(portion), sums)
        counts.extend(found.tokens for found in sums.values())

    def progress(done: int, total: int) -> None:
        if context.stop.is_set():
            raise Stopped
        bar.update(done, total, "")

    activations = Activations(context.home.cache)
    model, blocks = context.model, context.setting.blocks
    reason = stream(model, blocks, missing, batches, activations, keep, progress, wanted)
    return max(counts), reason


def _by_workers(
    context: Context,
    compressors: Compressors,
    missing: Sequence[Portion],
    wanted: Sequence[Portion],
    batches: Sequence[Batch],
    file: File,
    bar: Stage,
) -> int:
    """By workers, as far as the blocks are a chain; gives the most tokens that entered a site."""
    counts = [0]

    def take(work: Collect, result: Collected) -> None:
        if result.no_chain is not None:
            raise NoChain(result.no_chain)
        checked(result)
        if result.origin is not None:
            here = Path(work.file)
            fetch_to(here, result.origin["node"], cache_folder(result.origin) / here.name, WORKER)
        counts.append(result.tokens)
        bar.update(len(counts) - 1, len(missing), "")

    try:
        found = steps(context.model, context.setting.blocks, missing, batches[0], wanted)
        works = [Collect(step, str(file(step.portion))) for step in found]
        compressors.do(works, take)
    except NoChain:
        pass  # the pass in this process finds the reason too, and tells it
    return max(counts)
