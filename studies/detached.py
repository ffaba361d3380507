"""A study run by a process of its own, which outlives the terminal that submitted it."""

import os
import subprocess
import sys
import time

from sqlalchemy.engine import make_url

from apportion.errors import ApportionError
from apportion.studies.database.location import SECRETS
from apportion.studies.database.store import Store
from apportion.studies.home import Home

START_SECONDS = 120.0
POLL_SECONDS = 0.1


def launch(home: Home, store: Store, name: str, workers: int, ray: str | None = None) -> int:
    """Start a process that resumes the study, and wait until it holds it.

    Args:
        workers: evaluations at a time.
        ray: address of the cluster that they run on; None: this machine.

    Returns:
        The id of the process.

    Raises:
        ApportionError: it ended before that; what it said is in the message.
    """
    database, environment = _without_password(home)
    command = [sys.executable, "-P", "-m", "apportion", "--home", str(home.path), *database]
    cluster = [] if ray is None else ["--ray", ray]
    output = home.log(f"{name}.out")
    with output.open("ab") as file:
        begins_at = file.tell()
        process = subprocess.Popen(
            [*command, "resume", name, "--workers", str(workers), *cluster],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            env=environment,
            start_new_session=True,
        )
    deadline = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        row = store.find_study(name)
        if row is not None and row.owner is not None and row.owner.pid == process.pid:
            return process.pid
        time.sleep(POLL_SECONDS)
    if process.poll() is None:
        process.terminate()
    with output.open("rb") as file:
        file.seek(begins_at)
        said = file.read().decode(errors="replace").strip().splitlines()
    raise ApportionError(f"the study did not start: {said[-1] if said else 'it said nothing'}")


def _without_password(home: Home) -> tuple[list[str], dict[str, str]]:
    """The option that names the database, and the environment with its password.

    Everybody on a machine can read the arguments of a process, but not its environment.
    """
    environment = dict(os.environ)
    if home.database_url is None:
        return [], environment
    if "://" not in home.database_url:
        return ["--database", home.database_url], environment
    url = make_url(home.database_url)
    password = url.password or url.query.get("password")
    if isinstance(password, str):
        environment["PGPASSWORD"] = password
    # `set` cannot remove it
    url = url._replace(password=None).difference_update_query(SECRETS)
    return ["--database", url.render_as_string(hide_password=False)], environment
