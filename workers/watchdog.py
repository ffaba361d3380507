"""Ends the processes of a pool when its driver is gone, however that ended.

Ray's own helper processes outlive a killed driver by a minute. This process holds the reading end
of a pipe whose other end only the driver has; when it closes, all processes that carry the pool's
mark in their environment are killed, and its temporary folder is removed.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

MARK = "APPORTION_POOL"
PROC = Path("/proc")
SWEEP_SECONDS = 0.1
# A process that is being started while its parent is killed shows up in the next sweep.
EMPTY_SWEEPS = 3
MOST_SWEEPS = 200


def start_watchdog(folder: Path) -> "subprocess.Popen[bytes]":
    """Watch over the processes that are started with MARK=folder in their environment.

    Closing its `stdin` is the signal to end them.
    """
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "apportion.workers.watchdog", str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd="/",
        start_new_session=True,
    )


def marked(folder: str) -> list[int]:
    """Ids of the processes that carry the mark."""
    mark = f"{MARK}={folder}".encode()
    found = []
    for entry in PROC.glob("[0-9]*/environ"):
        try:
            carries = mark in entry.read_bytes().split(b"\0")
        except OSError:  # ended meanwhile, or another user's
            continue
        if carries:
            found.append(int(entry.parent.name))
    return found


def main() -> None:
    """Wait for the driver's end, then clear up."""
    folder = sys.argv[1]
    sys.stdin.buffer.read()
    empty = 0
    for _ in range(MOST_SWEEPS):
        processes = marked(folder)
        for pid in processes:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        empty = 0 if processes else empty + 1
        if empty == EMPTY_SWEEPS:
            break
        time.sleep(SWEEP_SECONDS)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
