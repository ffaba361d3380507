"""What a node lacks, from the node that has it, through Ray's object store."""

from collections.abc import Callable
from pathlib import Path

from apportion.files import write_whole
from apportion.hashing import file_hash
from apportion.spaces.bank import Bank, NotFetched
from apportion.workers.node_tasks import read_file
from apportion.workers.spec import Origin

RETRIES = 2
DRIVER = "the driver's node"
WORKER = "a worker's node"


def fetcher(origin: Origin, whose: str = DRIVER) -> Callable[[str], tuple[bytes, str]]:
    """Gives an entry's bytes and their hash, by its key. Raises NotFetched."""
    bank = Bank(Path(origin["bank"]))
    return lambda key: _read_there(origin["node"], bank.path(key), f"{whose} does not give {key}")


def fetch_file(node: str, path: Path, folder: Path) -> Path:
    """A file of the driver's node, there or in `folder` under the same name; fetched if need be.

    Raises:
        NotFetched: it does not come.
    """
    here = path if path.is_file() else folder / path.name
    if not here.is_file():
        fetch_to(here, node, path, DRIVER)
    return here


def fetch_to(here: Path, node: str, path: Path, whose: str) -> None:
    """Have a node's file here, whole. Raises NotFetched."""
    content, expected = _read_there(node, path, f"{whose} does not give {path}")
    try:
        write_whole(here, content)
        if file_hash(here) != expected:
            here.unlink(missing_ok=True)
            raise NotFetched(f"{here} is not what was sent: the disk is faulty")
    except OSError as error:
        raise NotFetched(f"{here} cannot be written: {error}") from error


def _read_there(node: str, path: Path, failed: str) -> tuple[bytes, str]:
    """What a file of a node holds, and its hash. Raises NotFetched, which says what `failed`."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    there = NodeAffinitySchedulingStrategy(node, soft=False)
    reading = ray.remote(read_file).options(
        num_cpus=0, scheduling_strategy=there, max_retries=RETRIES, retry_exceptions=True
    )
    try:
        content: tuple[bytes, str] = ray.get(reading.remote(str(path)))
    except ray.exceptions.RayError as error:
        told = " ".join(str(getattr(error, "cause", error)).split())
        raise NotFetched(f"{failed}: {told}") from error
    return content
