"""Tables as plain text that fits the terminal."""

import textwrap
from collections.abc import Sequence

GAP = "  "


def render_table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], width: int | None
) -> list[str]:
    """The lines of a table without borders; cells are wrapped where it is too wide.

    Args:
        columns: headings.
        rows: a text for each column.
        width: of the terminal; None: as wide as the table needs.
    """
    table = [list(columns), *(list(row) for row in rows)]
    by_column = list(zip(*table, strict=True))
    widths = [max(map(len, cells)) for cells in by_column]
    if width is not None:
        widths = _fitted(by_column, widths, width - 1)
    return [line for row in table for line in _row(row, widths)]


def _fitted(by_column: Sequence[Sequence[str]], widths: list[int], width: int) -> list[int]:
    """Widths that sum to `width`, taken from the widest column that words still fit into."""
    least = [max((len(w) for c in cells for w in c.split()), default=1) for cells in by_column]
    widths = list(widths)
    while sum(widths) + len(GAP) * (len(widths) - 1) > width:
        shrinkable = [i for i in range(len(widths)) if widths[i] > least[i]]
        if not shrinkable:
            shrinkable = [i for i in range(len(widths)) if widths[i] > 12]
        if not shrinkable:
            break
        widths[max(shrinkable, key=lambda i: widths[i])] -= 1
    return widths


def _row(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    cells = [textwrap.wrap(cell, w) or [""] for cell, w in zip(row, widths, strict=True)]
    height = max(len(lines) for lines in cells)
    return [
        " "
        + GAP.join(_nth(lines, n).ljust(w) for lines, w in zip(cells, widths, strict=True)).rstrip()
        for n in range(height)
    ]


def _nth(lines: Sequence[str], place: int) -> str:
    return lines[place] if place < len(lines) else ""
