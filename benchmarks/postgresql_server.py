"""A PostgreSQL server of one's own, on loopback, to be stopped and killed; for tests too."""

import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

PLACES = "/usr/lib/postgresql"
USER = "postgres"  # the server refuses to run as root
READY_SECONDS = 60.0
POLL_SECONDS = 0.05


def programs() -> Path | None:
    """The folder of the server's programs; None: not installed."""
    found = shutil.which("initdb")
    if found:
        return Path(found).resolve().parent
    versions = sorted(Path(PLACES).glob("*/bin/initdb"), key=lambda p: float(p.parts[-3]))
    return versions[-1].parent if versions else None


class PostgreSQLServer:
    """A server with a folder, a port and a password of its own.

    `stop` and `kill` leave its databases; `start` brings them back at the same address.
    """

    def __init__(self, synchronous: bool = True) -> None:
        """Makes the databases' folder; `synchronous`: written to the disk at each commit."""
        bin_ = programs()
        if bin_ is None:
            raise FileNotFoundError("PostgreSQL's server programs (initdb) are not installed")
        self._bin = bin_
        self._settings = ["-c", f"fsync={'on' if synchronous else 'off'}"]
        self.folder = Path(tempfile.mkdtemp(prefix="ap-pg-"))
        self.port = _free_port()
        self._password = secrets.token_hex(8)
        secret = self.folder / "password"
        secret.write_text(self._password)
        if os.geteuid() == 0:
            owner = pwd.getpwnam(USER)
            for path in (self.folder, secret):
                os.chown(path, owner.pw_uid, owner.pw_gid)
        self._run("initdb", "-D", self._data, "-U", "tester", "--pwfile", secret,
                  "--auth=scram-sha-256", "--no-sync", "-E", "UTF8", "--locale=C")  # fmt: skip
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def _data(self) -> Path:
        return self.folder / "data"

    def url(self, database: str = "postgres") -> str:
        """The address of one of its databases."""
        return f"postgresql+psycopg://tester:{self._password}@127.0.0.1:{self.port}/{database}"

    def start(self) -> None:
        """Start it and wait until it answers."""
        command = [self._bin / "postgres", "-D", self._data, "-p", str(self.port)]
        command += [
            "-c",
            "listen_addresses=127.0.0.1",
            "-c",
            f"unix_socket_directories={self.folder}",
        ]
        log = (self.folder / "log").open("ab")
        self._process = subprocess.Popen(
            [*map(str, command), *self._settings], stdout=log, stderr=log, cwd="/", **_as_user()
        )
        deadline = time.monotonic() + READY_SECONDS
        ready = [str(self._bin / "pg_isready"), "-q", "-h", "127.0.0.1", "-p", str(self.port)]
        while subprocess.run(ready, check=False).returncode != 0:
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError((self.folder / "log").read_text()[-2000:])
            time.sleep(POLL_SECONDS)

    def stop(self) -> None:
        """End it in order: connections are cut, everything is written."""
        self._end(signal.SIGINT)

    def kill(self) -> None:
        """SIGKILL: what was committed is recovered at the next start."""
        self._end(signal.SIGKILL)

    def remove(self) -> None:
        """Kill it and remove its folder."""
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def sql(self, statement: str, database: str = "postgres") -> str:
        """What psql prints for a statement."""
        environment = os.environ | {"PGPASSWORD": self._password}
        place = ["-h", "127.0.0.1", "-p", str(self.port), "-U", "tester", "-d", database]
        command = [str(self._bin / "psql"), "-X", "-q", "-t", "-A", "-v", "ON_ERROR_STOP=1", *place]
        done = subprocess.run(
            command, env=environment, input=statement, check=True, capture_output=True, text=True
        )
        return done.stdout

    def dump(self, database: str) -> str:
        """A database as SQL."""
        environment = os.environ | {"PGPASSWORD": self._password}
        place = ["-h", "127.0.0.1", "-p", str(self.port), "-U", "tester", "-d", database]
        command = [str(self._bin / "pg_dump"), "--inserts", "--no-owner", *place]
        done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
        return done.stdout

    def _end(self, number: int) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)
            self._process.wait()
        self._process = None

    def _run(self, program: str, *arguments: object) -> None:
        command = [str(self._bin / program), *map(str, arguments)]
        subprocess.run(command, check=True, capture_output=True, cwd="/", **_as_user())


def _as_user() -> dict[str, object]:
    if os.geteuid() != 0:
        return {}
    owner = pwd.getpwnam(USER)
    return {"user": owner.pw_uid, "group": owner.pw_gid, "extra_groups": []}


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
