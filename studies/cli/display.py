"""What a running study shows: bars on a terminal, lines anywhere else."""

import json
import logging
import os
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from apportion.studies.cli.table import render_table

LINE_EVERY_S = 30.0
NAME_WIDTH = 10
INDENT = " " * (NAME_WIDTH + 2)
DEFAULT_WIDTH = 80


class Stage(Protocol):
    """A stage that is being worked on."""

    def update(self, done: float, total: float, text: str = "") -> None:
        """`done` of `total` are done; `text` says it in words."""

    def end(self, text: str) -> None:
        """The stage is done; `text` is its one line."""


class Display(Protocol):
    """Where a study says what it does."""

    def header(self, text: str) -> None:
        """What this is about."""

    def stage(self, name: str) -> AbstractContextManager[Stage]:
        """A stage from its beginning to its end."""

    def line(self, text: str) -> None:
        """One line."""

    def warning(self, text: str) -> None:
        """One line that should not be overlooked."""

    def table(
        self, columns: Sequence[str], rows: Sequence[Sequence[str]], footnotes: Sequence[str] = ()
    ) -> None:
        """A table, and what is to be said of it."""


def duration(seconds: float) -> str:
    """61.24 -> "61.2 s", 3000 -> "50 min", 10000 -> "2.8 h"."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


class ConsoleStage:
    """One stage on a console.

    Args:
        write: prints a line of text.
        progress: the bars of a terminal; None: a line every 30 s.
        width: of the terminal; None: lines are not broken.
        now: a clock in seconds.
    """

    def __init__(
        self,
        name: str,
        write: Callable[[str], None],
        progress: Progress | None,
        width: int | None,
        now: Callable[[], float],
    ) -> None:
        self._name = name
        self._write = write
        self._progress = progress
        self._width = width
        self._now = now
        self._began = self._said = now()
        self._task = None
        if progress is not None:
            self._task = progress.add_task(f"{name:<{NAME_WIDTH}}", total=None, text="", left="")

    def update(self, done: float, total: float, text: str = "") -> None:
        now = self._now()
        left = duration((now - self._began) * (total - done) / done) if done > 0 else ""
        if self._progress is not None and self._task is not None:
            left = f"{left} left" if left else ""
            self._progress.update(self._task, completed=done, total=total, text=text, left=left)
        elif now - self._said >= LINE_EVERY_S:
            self._said = now
            share = f"{100 * done / total:.0f} %" if total > 0 else ""
            words = (share, text, f"{left} left" if left else "")
            self._write(f" {self._name:<{NAME_WIDTH}} {' · '.join(w for w in words if w)}")

    def end(self, text: str) -> None:
        if self._progress is not None:
            self._progress.stop()
        stamp = duration(self._now() - self._began)
        start = f" {self._name:<{NAME_WIDTH}} "
        if self._width is None:
            self._write(f"{start}{text}  {stamp}")
            return
        room = max(20, self._width - len(INDENT) - len(stamp) - 3)
        lines = textwrap.wrap(text, room) or [""]
        lines[-1] = f"{lines[-1]:<{room}}  {stamp}"
        self._write(start + f"\n{INDENT}".join(lines))


class _Console(Console):
    """Leaves a reader that went away to the command line, which knows the exit status."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


class ConsoleDisplay:
    """The display of the command line: `file` is a terminal, a pipe or a file."""

    def __init__(self, file: TextIO, now: Callable[[], float] = time.monotonic) -> None:
        self._width = _terminal_width(file)
        self._console = _Console(
            file=file,
            width=self._width or 1_000,
            force_terminal=self._width is not None,
            highlight=False,
            markup=False,
            emoji=False,
        )
        self._now = now

    def header(self, text: str) -> None:
        self._write(self._wrapped(text), "bold")

    @contextmanager
    def stage(self, name: str) -> Iterator[Stage]:
        progress = None if self._width is None else self._progress()
        if progress is not None:
            progress.start()
        try:
            yield ConsoleStage(name, self._write, progress, self._width, self._now)
        finally:
            if progress is not None:
                progress.stop()

    def line(self, text: str) -> None:
        self._write(self._wrapped(text))

    def warning(self, text: str) -> None:
        self._write(self._wrapped(f" warning: {text}"), "yellow")

    def table(
        self, columns: Sequence[str], rows: Sequence[Sequence[str]], footnotes: Sequence[str] = ()
    ) -> None:
        heading, *body = render_table(columns, rows, self._width)
        self._write(heading, "bold")
        for text in (*body, *(self._wrapped(f" {note}") for note in footnotes)):
            self._write(text)

    def json(self, value: object) -> None:
        """`value` as JSON, unbroken."""
        self._console.file.write(json.dumps(value, indent=2) + "\n")

    def _write(self, text: str, style: str | None = None) -> None:
        self._console.print(text, style=style, soft_wrap=True)

    def _wrapped(self, text: str) -> str:
        if self._width is None:
            return text
        indent = " " * (len(text) - len(text.lstrip()) + 2)
        lines = (
            textwrap.wrap(line, self._width, subsequent_indent=indent, break_on_hyphens=False)
            for line in text.splitlines()
        )
        return "\n".join("\n".join(line) for line in lines)

    def _progress(self) -> Progress:
        return Progress(
            TextColumn(" {task.description}", markup=False),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[text]}", markup=False),
            TextColumn("{task.fields[left]}", markup=False),
            console=self._console,
            transient=True,
        )


class QuietStage:
    """A stage of which nothing is shown."""

    def update(self, done: float, total: float, text: str = "") -> None: ...

    def end(self, text: str) -> None: ...


class QuietDisplay:
    """For Python: nothing is shown, warnings are logged."""

    def header(self, text: str) -> None: ...

    @contextmanager
    def stage(self, name: str) -> Iterator[Stage]:
        yield QuietStage()

    def line(self, text: str) -> None: ...

    def warning(self, text: str) -> None:
        logging.getLogger("apportion").warning(text)

    def table(
        self, columns: Sequence[str], rows: Sequence[Sequence[str]], footnotes: Sequence[str] = ()
    ) -> None: ...


def _terminal_width(file: TextIO) -> int | None:
    """Columns of the terminal that `file` is; None where it is none."""
    if not file.isatty():
        return None
    columns = os.environ.get("COLUMNS", "")
    if columns.isdigit() and int(columns) > 0:
        return int(columns)
    return os.get_terminal_size(file.fileno()).columns or DEFAULT_WIDTH
