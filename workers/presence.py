"""Which workers of a pool are there; it says so when none has been for a while."""

import threading
import time
from collections.abc import Callable

PATIENCE_SECONDS = 10.0


class Presence:
    """Told by workers that come and go. Safe to use from several threads."""

    def __init__(
        self, tell: Callable[[str], None], text: str, seconds: float = PATIENCE_SECONDS
    ) -> None:
        """Takes what to say, to whom, and after how long without any worker."""
        self._tell = tell
        self._text = text
        self._seconds = seconds
        self._lock = threading.Lock()
        self._count = 0
        self._alone_since: float | None = time.monotonic()

    def came(self) -> None:
        """A worker is ready."""
        with self._lock:
            self._count += 1
            self._alone_since = None

    def went(self) -> None:
        """A worker that was ready is no more."""
        with self._lock:
            self._count -= 1
            if not self._count:
                self._alone_since = time.monotonic()

    def look(self) -> None:
        """Called now and then by those who wait; says once each time that nobody is there."""
        with self._lock:
            since = self._alone_since
            if since is None or time.monotonic() - since < self._seconds:
                return
            self._alone_since = None
        self._tell(self._text)
