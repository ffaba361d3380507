"""Where a node of a cluster keeps what it is sent: its own home, with a bank and a cache."""

import hashlib
import os
from pathlib import Path

import platformdirs

from apportion.files import write_whole
from apportion.workers.spec import Origin, WorkerSpec

VARIABLE = "APPORTION_HOME"


def localized(spec: WorkerSpec, index: bytes | None, driver: str) -> WorkerSpec:
    """The specification as it holds on this node.

    Args:
        spec: as it holds on the driver's node.
        index: what its index file holds.
        driver: Ray's id of the driver's node, where missing entries of the bank are.

    Raises:
        OSError: the node's home cannot be written.
    """
    home = _home(Path(spec["bank"]).parent)
    local = WorkerSpec(**spec)
    local["bank"] = str(home / "bank")
    if index is not None:
        file = home / "cache" / f"bank-{hashlib.blake2b(index, digest_size=16).hexdigest()}.json"
        if not file.is_file():
            write_whole(file, index)
        local["index"] = str(file)
    local["origin"] = Origin(node=driver, bank=spec["bank"])
    return local


def _home(of_driver: Path) -> Path:
    """What Ray's environment on this node says, else the driver's where the nodes share it."""
    if named := os.environ.get(VARIABLE):
        return Path(named).expanduser().absolute()
    return of_driver if of_driver.is_dir() else platformdirs.user_data_path("apportion", False)
