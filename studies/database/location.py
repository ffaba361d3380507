"""Where a database may lie: the path behind an address, and the disks it cannot live on."""

import os
from pathlib import Path

import psutil  # type: ignore[import-untyped]
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

from apportion.errors import InvalidInput

# SQLite's write-ahead log is shared memory, which these cannot share between machines.
NETWORK_FILE_SYSTEMS = frozenset(
    "9p afpfs beegfs ceph cifs davfs glusterfs gpfs lustre ncpfs nfs nfs4 smb smb2 smb3 smbfs"
    " webdav fuse.ceph fuse.gcsfuse fuse.glusterfs fuse.rclone fuse.s3fs fuse.sshfs".split()
)


def database_path(address: str | Path) -> Path:
    """The path, links followed, of `address`, a path or "sqlite:///PATH".

    Raises InvalidInput for other addresses, a folder that is not there, and network disks.
    """
    path = Path(_file_of(str(address))).resolve()
    if not os.path.isdir(path.parent):
        raise InvalidInput(f"{path}: there is no folder {path.parent}; make it first")
    if os.path.isdir(path):
        raise InvalidInput(f"{path}: is a folder; name a file in it")
    file_system = file_system_of(path)
    if file_system in NETWORK_FILE_SYSTEMS:
        raise InvalidInput(
            f"{path}: lies on a network disk ({file_system}), where SQLite can lose data;"
            " name a file on a disk of this machine"
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


def _file_of(address: str) -> str:
    if "://" not in address:
        return address
    usage = 'write "sqlite:////folder/studies.db", or only the path'
    try:
        url = make_url(address)
    except ArgumentError as error:
        raise InvalidInput(f'"{address}" is no database address; {usage}') from error
    if url.drivername != "sqlite" or url.query or not url.database or url.database == ":memory:":
        raise InvalidInput(f"{url.render_as_string()}: only SQLite files are supported; {usage}")
    return url.database
