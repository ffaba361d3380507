"""Who runs a study: a process of a host, told from a later process with the same number."""

import os
import socket
from dataclasses import dataclass

import psutil  # type: ignore[import-untyped]

# The start of a process is kept relative to the boot, whose time moves with clock corrections.
START_TOLERANCE_SECONDS = 2.0


@dataclass(frozen=True)
class Owner:
    """A process: `started` is in seconds since 1970 by its host's clock."""

    host: str
    pid: int
    started: float

    @classmethod
    def this_process(cls) -> "Owner":
        """The process that asks."""
        return cls(socket.gethostname(), os.getpid(), psutil.Process().create_time())

    def is_dead(self) -> bool:
        """Whether this is certainly over: never said of another host's process."""
        if self.host != socket.gethostname():
            return False
        try:
            process = psutil.Process(self.pid)
            if process.status() == psutil.STATUS_ZOMBIE:
                return True
            started: float = process.create_time()
            return abs(started - self.started) > START_TOLERANCE_SECONDS
        except psutil.NoSuchProcess:
            return True
        except psutil.AccessDenied:
            return False

    def __str__(self) -> str:
        return f"pid {self.pid} on {self.host}"
