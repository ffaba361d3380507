"""A pool of Ray actors on this machine, one evaluator each; a killed one is replaced."""

import atexit
import logging
import os
import secrets
import tempfile
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from apportion.errors import ApportionError
from apportion.workers.evaluator import Evaluate, Evaluation
from apportion.workers.pool import Workers, attempt
from apportion.workers.processes import THREAD_VARIABLES
from apportion.workers.spec import WorkerSpec, build_evaluator
from apportion.workers.watchdog import MARK, start_watchdog

LIVES = 3
CLOSE_SECONDS = 5.0
# Results are a few kilobytes; Ray takes no less.
OBJECT_STORE_BYTES = 80 * 1024**2


class EvaluatorActor:
    """What runs in a worker process."""

    def __init__(self, spec: WorkerSpec) -> None:
        self._spec = spec

    def build(self) -> int:
        """Make the evaluator; gives the process id."""
        self._evaluator = build_evaluator(self._spec)
        return os.getpid()

    def run(self, work: Evaluate) -> Evaluation:
        """Evaluate; an exception becomes a failure."""
        return attempt(self._evaluator.evaluate, work)


class RayPool:
    """Evaluators in processes of their own, under a Ray of their own.

    Make it in a thread that lives as long as the pool: the kernel ends Ray's processes with the
    thread that started them.
    """

    def __init__(self, spec: WorkerSpec, workers: int) -> None:
        """Start Ray and the workers, each with its evaluator built.

        Raises:
            ApportionError: Ray is running in this process already, or a worker does not start.
            InvalidInput: the evaluator cannot be built from `spec`.
        """
        self.recoveries = 0
        self._spec = spec
        self._lock = threading.Lock()
        self._closing = False
        self._workers: Workers | None = None
        self._folder = _temporary_folder()
        self._watchdog = start_watchdog(self._folder)
        atexit.register(self.close)
        with ExitStack() as stack:
            stack.callback(self.close)
            self._ray = _start_ray(self._folder, workers, spec["threads"])
            actors = [self._start_actor() for _ in range(workers)]
            self._get([actor.build.remote() for actor in actors])
            self._actors = dict(enumerate(actors))
            self._workers = Workers([self._worker(place) for place in range(workers)])
            stack.pop_all()

    def submit(self, work: Evaluate) -> "Future[Evaluation]":
        """Queue work for the next free worker."""
        if self._workers is None or self._closing:
            raise ApportionError("the pool is closed")
        return self._workers.submit(work)

    def close(self) -> None:
        """Cancel what has not begun, end Ray with all its processes, remove its folder."""
        with self._lock:
            if self._closing:
                return
            self._closing = True
        atexit.unregister(self.close)
        if self._workers is not None:
            self._workers.cancel_waiting()
        import ray

        for actor in getattr(self, "_actors", {}).values():
            ray.kill(actor)
        if self._workers is not None:
            self._workers.join(CLOSE_SECONDS)
        ray.shutdown()
        # Also kills what Ray left, and removes the folder.
        self._watchdog.communicate()

    def _start_actor(self) -> Any:
        # Not restarted by Ray: its retries would not be counted, nor bounded.
        actor = self._ray.remote(EvaluatorActor)
        return actor.options(num_cpus=1, max_restarts=0, max_task_retries=0).remote(self._spec)

    def _get(self, references: Any) -> Any:
        """`ray.get`, with the exception that the worker raised."""
        try:
            return self._ray.get(references)
        except self._ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, ApportionError):
                raise error.cause from error
            raise ApportionError(f"a worker failed: {error.cause}") from error

    def _worker(self, place: int) -> Any:
        def run(work: Evaluate) -> Evaluation:
            died = self._ray.exceptions.RayActorError
            for _ in range(LIVES):
                try:
                    result: Evaluation = self._get(self._actors[place].run.remote(work))
                    return result
                except died:
                    if self._closing:
                        break
                    self._replace(place)
            reason = "the pool was closed" if self._closing else f"{LIVES} workers died of it"
            raise ApportionError(f"an evaluation was given up: {reason}")

        return run

    def _replace(self, place: int) -> None:
        with self._lock:
            self.recoveries += 1
        actor = self._start_actor()
        self._get(actor.build.remote())
        self._actors[place] = actor


def _start_ray(folder: Path, workers: int, threads: int) -> Any:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    # What Ray does on macOS: it listens on the loopback interface only. Asked for 127.0.0.1 it
    # takes the machine's address and listens to the world. Read when ray is imported.
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    # A token for this run only, in memory: Ray would write a lasting one into the user's home.
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    import ray

    if ray.is_initialized():
        raise ApportionError("Ray is running in this process already; a study starts its own")
    working = folder / "work"
    working.mkdir()
    with _inherited({MARK: str(folder), "SPT_NOENV": "1"}):
        ray.init(
            address="local",
            num_cpus=workers,
            num_gpus=0,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            object_store_memory=OBJECT_STORE_BYTES,
            # Ray puts its working directory on the workers' import path: it must be an empty one.
            runtime_env={
                "working_dir": str(working),
                "env_vars": dict.fromkeys(THREAD_VARIABLES, str(threads)),
            },
            _temp_dir=str(folder),
        )
    return ray


@contextmanager
def _inherited(variables: Mapping[str, str]) -> Iterator[None]:
    """Variables for the processes that start here, and for no later ones, such as timing.

    SPT_NOENV keeps Ray from writing its processes' titles over their environment and the mark.
    """
    os.environ.update(variables)
    try:
        yield
    finally:
        for name in variables:
            del os.environ[name]


def _temporary_folder() -> Path:
    """A short path, because Ray's socket names below it may have 107 characters at most."""
    short = Path("/tmp")
    parent = short if short.is_dir() else Path(tempfile.gettempdir())
    return Path(tempfile.mkdtemp(prefix="ap-", dir=parent))
