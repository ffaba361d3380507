"""What starts and ends a worker process: its threads, and an end with its parent."""

import ctypes
import signal
import sys
from contextlib import suppress

import psutil  # type: ignore[import-untyped]

PR_SET_PDEATHSIG = 1
# What torch and numpy read when they are imported.
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent ends, however it ends (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def end_process(pid: int) -> None:
    """A stopped or hanging process does not hear Ray, and what it started does not end with it."""
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for each in (process, *process.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                each.kill()
