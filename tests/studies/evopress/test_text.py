"""Foreign text files are read as they lie there."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apportion.errors import InvalidInput
from apportion.studies.evopress.text import content, lines


@given(st.lists(st.text("ab ,:", min_size=1).filter(str.strip), min_size=1), st.booleans())
def test_lines_joined_are_the_text(texts: list[str], newline: bool) -> None:
    assert lines("\n".join(texts) + "\n" * newline, "file") == (texts, newline)


def test_content_keeps_line_ends(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"a: 3\r\nb: 4\n")
    assert content(tmp_path / "a.txt") == "a: 3\r\nb: 4\n"


def test_content_unreadable_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"a: 3\n\xff")
    with pytest.raises(InvalidInput, match="is no UTF-8 text: byte 5"):
        content(tmp_path / "a.txt")
    with pytest.raises(InvalidInput, match="none.txt cannot be read: No such file"):
        content(tmp_path / "none.txt")
