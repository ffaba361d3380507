"""What is shown while a study runs, and how tables fit."""

import io
import os
import pty
from contextlib import suppress
from itertools import count

import pytest

from apportion.studies.cli.display import ConsoleDisplay, duration
from apportion.studies.cli.table import render_table

COLUMNS = ["", "#", "held-out KL", "latency phone ms", "size MB", "dropped"]
ROWS = [
    ["*", "4", "0.012 ±0.001", "8.9", "2.1", "1 attention, 1 mlp"],
    ["", "u w3g64", "0.031 ±0.002", "~9.04", "2.2", "-"],
]


@pytest.mark.parametrize("width", [80, 120, None])
def test_table_one_line_a_row_where_it_fits(width: int | None) -> None:
    lines = render_table(COLUMNS, ROWS, width)
    assert len(lines) == 3
    assert all(len(line) <= (width or 1000) and line == line.rstrip() for line in lines)


@pytest.mark.parametrize("width", [50, 60])
def test_table_wraps_cells_where_it_does_not_fit(width: int) -> None:
    lines = render_table(COLUMNS, ROWS, width)
    assert all(len(line) <= width for line in lines)
    assert sorted("".join(lines).split()) == sorted(
        " ".join([*COLUMNS, *ROWS[0], *ROWS[1]]).split()
    )


def test_piped_stage_says_a_line_every_30_s_and_one_at_its_end() -> None:
    file, seconds = io.StringIO(), count(0, 20)
    display = ConsoleDisplay(file, now=lambda: float(next(seconds)))
    with display.stage("search") as stage:
        for step in range(1, 5):
            stage.update(step, 5, f"step {step}")
        stage.end("done")
    lines = file.getvalue().splitlines()
    assert lines == [
        " search     40 % · step 2 · 60.0 s left",
        " search     80 % · step 4 · 20.0 s left",
        " search     done  100.0 s",
    ]


def test_piped_lines_are_never_broken() -> None:
    file = io.StringIO()
    display = ConsoleDisplay(file)
    display.line("word " * 100)
    display.table(["a"], [["word " * 100]])
    display.json({"a": "word " * 100})
    assert len(file.getvalue().splitlines()) == 1 + 2 + 3


def on_terminal(monkeypatch: pytest.MonkeyPatch, **variables: str) -> str:
    """What a terminal of 60 columns gets from a line, a stage and a table."""
    for name, value in ({"COLUMNS": "60", "TERM": "xterm"} | variables).items():
        monkeypatch.setenv(name, value)
    main, other = pty.openpty()
    with os.fdopen(other, "w") as file:
        display = ConsoleDisplay(file)
        display.warning("careful " * 10)
        with display.stage("search") as stage:
            stage.update(1, 2, "half")
            stage.end("all of it " * 10)
    said = b""
    with suppress(OSError):  # how a terminal says that nobody is left at its other end
        while part := os.read(main, 4096):
            said += part
    os.close(main)
    return said.decode()


def test_terminal_stage_is_a_bar_then_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    text = on_terminal(monkeypatch)
    assert "━" in text
    last = text.splitlines()[-1]
    assert last.startswith(" " * 12) and last.endswith(" s") and len(last) <= 60


def test_terminal_no_color_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "\x1b[33m" in on_terminal(monkeypatch)
    assert "\x1b[33m" not in on_terminal(monkeypatch, NO_COLOR="1")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.44, "0.4 s"), (61.2, "61.2 s"), (3000, "50 min"), (9000, "2.5 h")]
)
def test_duration_in_words(seconds: float, text: str) -> None:
    assert duration(seconds) == text
