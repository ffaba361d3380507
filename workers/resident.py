"""Ends a worker that takes more memory than its share, before the machine runs out."""

import threading

import psutil  # type: ignore[import-untyped]

POLL_SECONDS = 0.25


def private_bytes(process: psutil.Process) -> int:
    """Resident memory that ends with the process. Raises psutil.Error where there is none.

    Mapped files, such as the bank's, are resident too, but shared by all and given back under
    pressure: they are no reason to end anyone.
    """
    memory = process.memory_info()
    return int(memory.rss - getattr(memory, "shared", 0))


class ResidentWatch:
    """One thread that looks at every worker several times a second."""

    def __init__(self, limit_bytes: int) -> None:
        """Takes the most that a worker may have."""
        self.limit_bytes = limit_bytes
        self._lock = threading.Lock()
        self._exceeded: dict[psutil.Process, bool] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def add(self, process: psutil.Process) -> None:
        """Watch a process until it is removed."""
        with self._lock:
            self._exceeded[process] = False

    def remove(self, process: psutil.Process) -> None:
        """Watch it no more."""
        with self._lock:
            self._exceeded.pop(process, None)

    def exceeded(self, process: psutil.Process) -> bool:
        """Whether it was killed for its memory."""
        with self._lock:
            return self._exceeded.get(process, False)

    def close(self) -> None:
        """End the thread."""
        self._stop.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._stop.wait(POLL_SECONDS):
            with self._lock:
                watched = list(self._exceeded)
            for process in watched:
                try:
                    if private_bytes(process) > self.limit_bytes:
                        self._end(process)
                except psutil.Error:  # it ended by itself
                    continue

    def _end(self, process: psutil.Process) -> None:
        with self._lock:
            if process in self._exceeded:
                # Said before it dies, for whoever then asks why.
                self._exceeded[process] = True
                process.kill()
