"""Keeps what libraries print, log and warn out of the terminal."""

import io
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TextIO

FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


@contextmanager
def libraries_into(log: Path | None) -> Iterator[TextIO]:
    """Send to `log` all that is written on stdout and stderr, by C code and children too.

    Args:
        log: appended to; None: everything is shown.

    Yields:
        What still reaches the terminal, or the pipe, that stdout was.
    """
    if log is None:
        with _logging_to(sys.stderr):
            yield sys.stdout
        return
    with ExitStack() as stack:
        file = stack.enter_context(log.open("a", encoding="utf-8", buffering=1))
        terminal = stack.enter_context(_kept(sys.stdout))
        for stream, descriptor in ((sys.stdout, 1), (sys.stderr, 2)):
            if _descriptor(stream) == descriptor:
                stack.enter_context(_redirected(descriptor, file.fileno()))
        stack.enter_context(redirect_stdout(file))
        stack.enter_context(redirect_stderr(file))
        stack.enter_context(_logging_to(file))
        yield terminal


@contextmanager
def _kept(stream: TextIO) -> Iterator[TextIO]:
    """A stream to where `stream` goes now, whatever becomes of its descriptor."""
    descriptor = _descriptor(stream)
    if descriptor is None:
        yield stream
        return
    stream.flush()
    copy = os.dup(descriptor)
    with open(copy, "w", encoding=stream.encoding, errors="replace", buffering=1) as terminal:
        yield terminal


@contextmanager
def _redirected(descriptor: int, target: int) -> Iterator[None]:
    saved = os.dup(descriptor)
    os.dup2(target, descriptor)
    try:
        yield
    finally:
        os.dup2(saved, descriptor)
        os.close(saved)


@contextmanager
def _logging_to(stream: TextIO) -> Iterator[None]:
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter(FORMAT))
    root = logging.getLogger()
    root.addHandler(handler)
    logging.captureWarnings(True)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        root.removeHandler(handler)


def _descriptor(stream: TextIO) -> int | None:
    try:
        return stream.fileno()
    except io.UnsupportedOperation:
        return None
