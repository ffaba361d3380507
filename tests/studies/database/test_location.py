"""Which addresses are taken for a database."""

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from sqlalchemy import URL

from apportion.errors import InvalidInput
from apportion.studies.database.location import file_system_of, located, without_password


def mounts(monkeypatch: pytest.MonkeyPatch, table: list[tuple[str, str]]) -> None:
    rows = [SimpleNamespace(mountpoint=point, fstype=kind) for point, kind in table]
    monkeypatch.setattr(psutil, "disk_partitions", lambda all: rows)


def test_path_and_address_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "a %?#.db"
    assert located(path) == located("a %?#.db") == path
    assert located(f"sqlite:///{tmp_path}/b.db") == tmp_path / "b.db"


def test_path_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "link.db").symlink_to(tmp_path / "real.db")
    assert located(tmp_path / "link.db") == tmp_path / "real.db"


@pytest.mark.parametrize(
    "address",
    [
        "mysql://host/db",
        "postgresql://host",
        "postgresql+asyncpg://host/db",
        "sqlite://",
        "sqlite:///:memory:",
        "sqlite:///a?mode=ro",
        "://",
        "x://",
    ],
)
def test_address_refused(address: str) -> None:
    with pytest.raises(InvalidInput, match="; write a path, "):
        located(address)


@pytest.mark.parametrize("scheme", ["postgresql", "postgresql+psycopg"])
def test_server(scheme: str) -> None:
    url = located(f"{scheme}://me:secret@host:5433/db?sslmode=require")
    assert isinstance(url, URL)
    assert (url.drivername, url.password, url.port) == ("postgresql+psycopg", "secret", 5433)


@pytest.mark.parametrize(
    "address", ["postgresql://me:secret@host/db", "postgresql://me@host/db?password=secret"]
)
def test_address_to_be_shown(address: str) -> None:
    shown = without_password(address)
    assert "secret" not in shown and "me" in shown and "host/db" in shown
    assert without_password("a/path.db") == "a/path.db"


def test_password_not_shown() -> None:
    with pytest.raises(InvalidInput) as error:
        located("mysql://me:secret@host/db")
    assert "secret" not in str(error.value)


def test_folder_missing(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="there is no folder"):
        located(tmp_path / "missing" / "studies.db")


def test_folder_in_place_of_file(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="is a folder"):
        located(tmp_path)


@pytest.mark.parametrize("kind", ["nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "fuse.sshfs"])
def test_network_disk_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    mounts(monkeypatch, [("/", "ext4"), (str(tmp_path), kind)])
    with pytest.raises(InvalidInput, match=rf"network disk \({kind}\)"):
        located(tmp_path / "studies.db")


def test_file_system_is_of_the_deepest_mount(monkeypatch: pytest.MonkeyPatch) -> None:
    table = [("/", "ext4"), ("/a/b", "autofs"), ("/a/b", "xfs"), ("/a", "nfs"), ("/a/bc/d", "9p")]
    mounts(monkeypatch, table)
    assert file_system_of(Path("/a/b/c.db")) == "xfs"
    assert file_system_of(Path("/a/bc/c.db")) == "nfs"
    assert file_system_of(Path("/ab.db")) == "ext4"


@pytest.mark.parametrize(
    "address", ["postgresql+psycopg://me:secret@host:abc/studies", "nothing://me:secret@[host/x"]
)
def test_malformed_address_is_refused_without_its_password(address: str) -> None:
    with pytest.raises(InvalidInput, match="no database address|no address of ours") as error:
        located(address)
    assert "secret" not in str(error.value)
