"""Results that wait on the disk while the database cannot take them."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from apportion.files import write_whole
from apportion.studies.database.rows import Evaluation

SUFFIX = ".json"


class Spool:
    """A folder with a file for each result of one study: whole, or not there."""

    def __init__(self, folder: Path) -> None:
        """`folder` is made with the first result and removed with the last."""
        self.folder = folder

    def put(self, key: str, evaluation: Evaluation) -> None:
        """Keep a result. Raises OSError where the disk does not take it either."""
        self.folder.mkdir(parents=True, exist_ok=True)
        losses, weights = evaluation.losses, evaluation.weights
        value = {
            "losses": None if losses is None else losses.tolist(),
            "weights": None if weights is None else weights.tolist(),
            "failure": evaluation.failure,
            "seconds": evaluation.seconds,
            "error_class": evaluation.error_class,
        }
        write_whole(self.folder / f"{key}{SUFFIX}", json.dumps(value).encode())

    def __iter__(self) -> Iterator[tuple[str, Evaluation]]:
        """(key, result) of all that wait."""
        for file in sorted(self.folder.glob(f"*{SUFFIX}")):
            value = json.loads(file.read_bytes())
            for name in ("losses", "weights"):
                if value[name] is not None:
                    value[name] = np.array(value[name], np.float64)
            yield file.name.removesuffix(SUFFIX), Evaluation(**value)

    def remove(self, key: str) -> None:
        """Drop a result that the database has."""
        (self.folder / f"{key}{SUFFIX}").unlink(missing_ok=True)
        if not any(self.folder.iterdir()):
            self.folder.rmdir()
