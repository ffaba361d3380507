"""Workers that share calibration by block: whatever ends one, only its block is lost."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from apportion.studies.specification.defaults import physical_cores

pytestmark = pytest.mark.skipif(physical_cores() < 2, reason="workers share no single core")
Journey = Any
LONGEST_S = 120.0
IMPORTS = "import os\nimport sys\nimport time\nfrom pathlib import Path\n\nimport torch\n"
HELD = """def load(part: str) -> list[torch.Tensor]:
    program = Path(getattr(sys.modules["__main__"], "__file__", "")).name
    if part == "calibration" and program == "default_worker.py":
        try:
            with Path(__file__).with_name("held").open("x") as file:
                file.write(str(os.getpid()))
            time.sleep(600)
        except FileExistsError:
            pass
"""


def statistics(journey: Journey) -> dict[str, bytes]:
    """Name of a block's file -> what it holds."""
    found = (journey.home / "cache").glob("calibration-*.safetensors")
    return {file.name: file.read_bytes() for file in found}


def written(journey: Journey, names: list[str]) -> list[int]:
    return [(journey.home / "cache" / name).stat().st_mtime_ns for name in names]


@contextmanager
def half_calibrated(journey: Journey) -> Iterator[tuple[Any, int]]:
    """A study of two workers, the first of which hangs in its first block, and that one's pid."""
    journey.edit("data.py", "import torch\n", IMPORTS)
    journey.edit("data.py", "def load(part: str) -> list[torch.Tensor]:\n", HELD)
    with journey.process("submit", journey.study, "--workers", "2") as process:
        journey.until(lambda: statistics(journey))
        yield process, int((journey.folder / "held").read_text())


def test_block_of_a_killed_worker_is_collected_by_another(
    journey: Journey, finished: Journey
) -> None:
    with half_calibrated(journey) as (process, worker):
        left = list(statistics(journey))
        before = written(journey, left)
        os.kill(worker, signal.SIGKILL)
        _, error = process.communicate(timeout=LONGEST_S)
    assert (process.returncode, error) == (0, ""), error
    assert len(left) == 1 and written(journey, left) == before
    assert statistics(journey) == statistics(finished)
    assert journey.path() == finished.path()


def test_killed_driver_leaves_whole_blocks(journey: Journey, finished: Journey) -> None:
    with half_calibrated(journey) as (process, _):
        left = list(statistics(journey))
        before = written(journey, left)
        os.kill(process.pid, signal.SIGKILL)
    assert journey.nothing_left()
    with journey.process("resume", "tiny", "--workers", "2") as process:
        _, error = process.communicate(timeout=LONGEST_S)
    assert (process.returncode, error) == (0, ""), error
    assert len(left) == 1 and written(journey, left) == before
    assert statistics(journey) == statistics(finished)
    assert journey.path() == finished.path()
