"""What a study keeps of the configurations that it starts from."""

from pathlib import Path

from apportion.hashing import file_hash
from apportion.studies.starts import changed_file, without_starts


def test_what_a_start_holds_is_not_struck() -> None:
    struck = {"up": ["r50%", "s20%"], "down": ["r50%"]}
    starts = [{"configuration": {"up": "r50%"}}, {"configuration": {"down": "r50%", "out": "w8"}}]
    assert without_starts(struck, starts) == {"up": ["s20%"]}
    assert without_starts(struck, []) == struck


def test_changed_file_is_found_by_its_content(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    for file in (one, other):
        file.write_text("none\n")
    starts = [{"file": str(file), "hash": file_hash(file)} for file in (one, other)]
    assert changed_file(starts) is None
    other.write_text("attn\n")
    assert changed_file(starts) == str(other)
    other.unlink()
    assert changed_file(starts) is None
