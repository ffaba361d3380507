"""What a cluster's nodes do for others, as tasks of Ray.

Only light imports: Ray loads a task's module in a thread of its own, where torch must not begin.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from apportion.hashing import file_hash


def read_file(path: str) -> tuple[bytes, str]:
    """What a file of this node holds, and the hash of it. Raises OSError."""
    file = Path(path)
    return file.read_bytes(), file_hash(file)


def time_here(
    job: dict[str, Any], index: bytes | None, driver: str, threads: int
) -> Iterator[dict[str, Any]]:
    """What a timing tells, and at last its result. Raises like `run_timing`."""
    from apportion.workers.device_timing import timed

    yield from timed(job, index, driver, threads)
