"""Takes PostgreSQL away in the middle of a study, and looks at what that cost.

Formula. A simulated study (evopress, 40 sites, evaluations of 50 ms by two Ray workers) runs
against a server of its own. After a third of its trials the server is stopped in order for five
minutes; in a second cell it is killed with SIGKILL and stays away for 30 s. Identical means: the
same trials in the same order, with the same losses to the last bit, as a study that nothing
disturbed. Executions are counted by the evaluator itself, in a log.

Assumptions. The server's disk keeps what was synchronized; fsync is on.

Ceiling: no failed evaluation, no result executed twice, and proposals as soon as the server is back
(a driver that waits asks every 2 s at the latest).
"""

import os
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import simulated
from _report import Claim, at_most, table, write
from postgresql_server import PostgreSQLServer

from apportion.studies.database import Store

STUDY = dict(name="away", solver="evopress", sites=40, evaluations=150, windows=16)
CELLS = (("stopped", 300.0), ("killed", 30.0))
POLL_SECONDS = 0.05
MOST_SECONDS = 900.0
Row = dict[str, Any]


def trials_of(store: Store) -> int:
    """How many trials the study has by now."""
    study = store.find_study(STUDY["name"])
    return 0 if study is None else store.trial_count(study.id)


def until(store: Store, count: int, driver: "subprocess.Popen[bytes]") -> None:
    """Wait for so many trials."""
    deadline = time.monotonic() + MOST_SECONDS
    while trials_of(store) < count and driver.poll() is None:
        if time.monotonic() > deadline:
            raise SystemExit(f"no {count} trials within {MOST_SECONDS} s")
        time.sleep(POLL_SECONDS)


def cell(how: str, seconds: float, expected: list[Any]) -> Row:
    """Run the study, take the server away, bring it back."""
    server = PostgreSQLServer()
    log = Path(tempfile.mkdtemp()) / "executions"
    try:
        server.start()
        store = Store.open(server.url())
        command = simulated.command(
            **STUDY, address=server.url(), workers=2, seconds=0.05, patience=30.0, lease=10.0,
            log=str(log), spool=str(log.with_name("spool")),
        )  # fmt: skip
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
        driver = subprocess.Popen(command, env=environment)
        until(store, len(expected) // 3, driver)
        server.stop() if how == "stopped" else server.kill()
        time.sleep(seconds)
        server.start()
        back = time.monotonic()
        before = trials_of(store)
        until(store, before + 1, driver)
        resumed = time.monotonic() - back
        status = driver.wait(MOST_SECONDS)
        found = simulated.path_of(store, STUDY["name"])
        executions = log.read_text().split()
        return {
            "server": how,
            "away_seconds": seconds,
            "driver_status": status,
            "trials": len(found),
            "failed": sum(losses is None for *_, losses in found),
            "executions": len(executions),
            "executed_twice": len(executions) - len(set(executions)),
            "proposals_after_seconds": resumed,
            "identical": found == expected,
            "spool_empty": not log.with_name("spool").exists(),
        }
    finally:
        server.remove()


def claims(rows: list[Row]) -> list[Claim]:
    """What an outage may cost: nothing but its time."""
    made = []
    for row in rows:
        name = f"server {row['server']} for {row['away_seconds']:.0f} s"
        made += [
            at_most(f"{name}: failed evaluations", row["failed"], "evaluations", 0),
            at_most(f"{name}: results executed again", row["executed_twice"], "evaluations", 0),
            at_most(f"{name}: first proposal after its return", row["proposals_after_seconds"],
                    "s", 10),
            Claim(f"{name}: same path as undisturbed", row["identical"], "", "True",
                  row["identical"] and row["driver_status"] == 0 and row["spool_empty"]),
        ]  # fmt: skip
    return made


def main() -> None:
    """Both cells, then the claims."""
    expected = simulated.undisturbed(simulated.Plan(**STUDY))
    rows = [cell(how, seconds, expected) for how, seconds in CELLS]
    table(list(rows[0]), [[str(value) for value in row.values()] for row in rows])
    write("outage", 1, rows, claims(rows))


if __name__ == "__main__":
    main()
