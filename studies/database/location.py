"""Where a database may lie: what an address means, and the disks that SQLite cannot live on."""

import os
import re
from pathlib import Path

import psutil  # type: ignore[import-untyped]
from sqlalchemy import URL
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

from apportion.errors import InvalidInput

# SQLite's write-ahead log is shared memory, which these cannot share between machines.
NETWORK_FILE_SYSTEMS = frozenset(
    "9p afpfs beegfs ceph cifs davfs glusterfs gpfs lustre ncpfs nfs nfs4 smb smb2 smb3 smbfs"
    " webdav fuse.ceph fuse.gcsfuse fuse.glusterfs fuse.rclone fuse.s3fs fuse.sshfs".split()
)
POSTGRESQL = "postgresql+psycopg"
CREDENTIALS = re.compile(r"(://)[^/]*@")
SECRETS = ("password", "sslpassword")  # libpq takes them after the "?" as well
USAGE = 'write a path, "sqlite:////folder/studies.db", or "postgresql+psycopg://user@host/database"'


def located(address: str | Path) -> Path | URL:
    """The SQLite file, links followed, or the PostgreSQL database that an address names.

    Args:
        address: a path, "sqlite:///PATH" or "postgresql+psycopg://USER:PASSWORD@HOST/DATABASE".

    Raises:
        InvalidInput: for other addresses, a folder that is not there, and network disks.
    """
    text = str(address)
    if "://" not in text:
        return _checked_path(Path(text))
    try:
        url = make_url(text)
    except (ArgumentError, ValueError) as error:  # a port that is no number is a ValueError
        raise InvalidInput(f'"{without_password(text)}" is no database address; {USAGE}') from error
    if url.drivername in (POSTGRESQL, "postgresql") and url.database:
        return url.set(drivername=POSTGRESQL)
    if url.drivername != "sqlite" or url.query or not url.database or url.database == ":memory:":
        raise InvalidInput(f"{shown(url)}: is no address of ours; {USAGE}")
    return _checked_path(Path(url.database))


def without_password(address: str) -> str:
    """An address that may be shown."""
    try:
        return shown(make_url(address)) if "://" in address else address
    except (ArgumentError, ValueError):
        return CREDENTIALS.sub(r"\1***@", address)


def shown(url: URL) -> str:
    """An address without its passwords."""
    return url.difference_update_query(SECRETS).render_as_string()


def _checked_path(path: Path) -> Path:
    path = path.resolve()
    if not os.path.isdir(path.parent):
        raise InvalidInput(f"{path}: there is no folder {path.parent}; make it first")
    if os.path.isdir(path):
        raise InvalidInput(f"{path}: is a folder; name a file in it")
    file_system = file_system_of(path)
    if file_system in NETWORK_FILE_SYSTEMS:
        raise InvalidInput(
            f"{path}: lies on a network disk ({file_system}), where SQLite can lose data;"
            " name a file on a disk of this machine, or use PostgreSQL"
        )
    return path


def file_system_of(path: Path) -> str:
    """The type of the mount that `path` lies on ("ext4", "nfs4"); "" where it cannot be told."""
    mounts = [
        (len(Path(mount.mountpoint).parts), order, mount.fstype)
        for order, mount in enumerate(psutil.disk_partitions(all=True))
        if path.is_relative_to(mount.mountpoint)
    ]
    # the deepest mount; of several at one place the last hides the others
    return str(max(mounts)[2]).lower() if mounts else ""
