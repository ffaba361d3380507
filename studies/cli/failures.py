"""What a failure leaves behind: one line on stderr, the traceback in the log, an exit status."""

import os
import sys
import traceback
from datetime import datetime
from types import TracebackType

from apportion.studies.cli.session import Session

INTERRUPTED = 130
BROKEN_PIPE = 141
"""What a shell reports for a process that SIGPIPE ended."""


def refuse(message: str) -> int:
    """Say what the user can mend. Returns the exit status."""
    print(message, file=sys.stderr)
    return 2


def fail(session: Session, error: BaseException) -> int:
    """Say what went wrong on our side, and where to read more. Returns the exit status."""
    details = "".join(traceback.format_exception(error))
    if session.debug:
        print(details, file=sys.stderr, end="")
        return 1
    first = next(iter(str(error).splitlines()), "")
    what = f"{type(error).__name__}: {first}" if first else type(error).__name__
    try:
        session.log.parent.mkdir(parents=True, exist_ok=True)
        with session.log.open("a", encoding="utf-8") as log:
            log.write(f"{datetime.now().isoformat(timespec='seconds')} {details}")
    except OSError as unwritable:
        print(f"apportion: {what} (no log: {unwritable}; --debug shows all)", file=sys.stderr)
        return 1
    print(f"apportion: {what} (details in {session.log}; --debug shows all)", file=sys.stderr)
    return 1


def unexpected(
    session: Session,
    kind: type[BaseException],
    error: BaseException,
    trace: TracebackType | None,
) -> None:
    """The hook for what nobody caught; Python exits with 1 after it."""
    fail(session, error.with_traceback(trace))


def reader_left() -> int:
    """Whoever read our output has closed the pipe. Returns the exit status."""
    # the interpreter flushes stdout once more at its exit
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return BROKEN_PIPE
