"""A Ray of our own: started for one pool, silent, on the loopback interface, in its own folder."""

import logging
import os
import secrets
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from apportion.errors import ApportionError
from apportion.workers.processes import THREAD_VARIABLES
from apportion.workers.watchdog import MARK

# Results are a few kilobytes; Ray takes no less.
OBJECT_STORE_BYTES = 80 * 1024**2


def start_ray(folder: Path, workers: int, threads: int) -> Any:
    """Ray, for this process alone, listening on this machine only.

    Args:
        folder: where it keeps its files; also the mark of its processes.
        workers: actors that it has room for.
        threads: intra-op threads of a worker.

    Raises:
        ApportionError: Ray is running in this process already.
    """
    _configure()
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


def keep_quiet() -> None:
    """What Ray reads when it is imported, so that it tells nobody anything."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    # That a worker died is in the bill; Ray would print a paragraph into the user's output.
    os.environ["RAY_DEDUP_LOGS_SKIP_REGEX"] = ".*"


def _configure() -> None:
    """What a Ray of our own reads beside that."""
    keep_quiet()
    # What Ray does on macOS: it listens on the loopback interface only. Asked for 127.0.0.1 it
    # takes the machine's address and listens to the world.
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    # A token for this run only, in memory: Ray would write a lasting one into the user's home.
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


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


def temporary_folder() -> Path:
    """A short path, because Ray's socket names below it may have 107 characters at most."""
    short = Path("/tmp")
    parent = short if short.is_dir() else Path(tempfile.gettempdir())
    return Path(tempfile.mkdtemp(prefix="ap-", dir=parent))
