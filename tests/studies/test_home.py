"""Where studies live."""

import os
from pathlib import Path

import pytest

from apportion.errors import InvalidInput
from apportion.studies.home import Home


def test_find_given_before_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APPORTION_HOME", str(tmp_path / "variable"))
    assert Home.find(tmp_path / "given").path == tmp_path / "given"
    assert Home.find().path == tmp_path / "variable"


def test_find_without_any_is_the_users_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("APPORTION_HOME", raising=False)
    assert Home.find().path.is_absolute()


def test_find_makes_nothing(tmp_path: Path) -> None:
    home = Home.find(tmp_path / "new")
    assert not home.path.exists()
    assert home.create().log("demo").parent.is_dir()


def test_database_moves_the_database_only(tmp_path: Path) -> None:
    home = Home.find(tmp_path, "sqlite:////elsewhere/studies.db")
    assert home.database == "sqlite:////elsewhere/studies.db"
    assert home.bank == tmp_path / "bank"
    assert Home.find(tmp_path).database == f"sqlite:///{tmp_path}/studies.db"


def test_create_on_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidInput, match="choose another folder with --home"):
        Home.find(tmp_path / "file").create()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_create_unwritable_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(InvalidInput, match="choose another folder with --home"):
        Home.find(tmp_path / "home").create()


def test_command_repeats_the_options(tmp_path: Path) -> None:
    assert Home.find(tmp_path / "a b").command("resume x").endswith("a b' resume x")
    assert Home.find().command("resume x") == "apportion resume x"
