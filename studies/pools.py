"""The workers of a study: this process, others of this machine, or a cluster's."""

from collections.abc import Callable

from apportion.studies.context import Context
from apportion.workers.cluster_pool import ClusterPool
from apportion.workers.patience import Patience
from apportion.workers.pool import InProcessPool, Pool
from apportion.workers.ray_pool import RayPool
from apportion.workers.ray_worker import Build
from apportion.workers.spec import WorkerSpec


def open_pool(
    context: Context,
    spec: WorkerSpec,
    build: Build,
    in_process: Callable[[], InProcessPool],
    patience: Patience | None = None,
) -> Pool:
    """The pool that a study was asked to run with; whoever opens it closes it.

    Args:
        spec: what a worker is made of.
        build: makes what does the work of a process.
        in_process: makes the pool where this process is the only worker.
        patience: gives time limits to those in processes of their own.

    Raises:
        InvalidInput, ApportionError: a worker cannot be built, or does not start.
    """
    workers, tell = context.workers, context.display.warning
    if context.cluster is not None:
        return ClusterPool(context.cluster, spec, workers, tell, build=build, patience=patience)
    if workers == 1:
        return in_process()
    return RayPool(spec, workers, build=build, patience=patience)
