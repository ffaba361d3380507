"""Watching a study that another process runs."""

import io
import json
import select
import sys
import time
from collections.abc import Callable

from rich.console import Console
from rich.live import Live
from rich.text import Text

from apportion.studies.cli.records import Status
from apportion.studies.cli.reports import status_line

POLL_SECONDS = 1.0
LINE_SECONDS = 2.0
"""Into a pipe: no more often, but for another state or stage."""


def follow_status(look: Callable[[], Status], as_json: bool) -> Status:
    """Tell on stdout how far a study is until it is no longer run.

    On a terminal in one line that changes, elsewhere in a line whenever something has changed;
    as JSON in a record a line, the last one too.

    Returns:
        What it has come to.

    Raises:
        BrokenPipeError: who read it has left.
    """
    if sys.stdout.isatty() and not as_json:
        return _follow_live(look)
    said, at = None, 0.0
    while True:
        found, now = look(), time.monotonic()
        news, place = found | {"seconds_left": None}, (found["state"], found["stage"])
        is_due = said is None or place != (said["state"], said["stage"])
        if is_due or (news != said and now - at >= LINE_SECONDS):
            if as_json or found["state"] == "running":
                print(json.dumps(found) if as_json else status_line(found), flush=True)
            said, at = news, now
        if found["state"] != "running":
            return found
        if _reader_left():
            raise BrokenPipeError
        time.sleep(POLL_SECONDS)


def _follow_live(look: Callable[[], Status]) -> Status:
    with Live(console=Console(highlight=False), auto_refresh=False, transient=True) as live:
        while (found := look())["state"] == "running":
            line = Text(status_line(found), no_wrap=True, overflow="ellipsis")
            live.update(line, refresh=True)
            time.sleep(POLL_SECONDS)
    return found


def _reader_left() -> bool:
    """Whether nobody reads stdout any more: told without writing to it."""
    try:
        pipe = select.poll()
        pipe.register(sys.stdout.fileno(), 0)
    except (io.UnsupportedOperation, ValueError):
        return False
    return any(event & select.POLLERR for _, event in pipe.poll(0))
