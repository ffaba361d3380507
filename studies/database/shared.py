"""What studies share: evaluations and measurements, named by what they are of."""

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from sqlalchemy import Connection, func, select

from apportion.errors import ApportionError
from apportion.hashing import canonical_json
from apportion.studies.database import encoding, statements, tables
from apportion.studies.database.rows import Evaluation, Lease
from apportion.studies.database.tables import bills, database_clock, evaluations, failures
from apportion.studies.database.trials import Trials

OF_WORKERS = ("timeout", "memory", "died")
"""Failures that another study may not meet."""


class Shared(Trials):
    """The store's part that keeps what belongs to no study, and what it cost this one."""

    def record_evaluation(
        self,
        lease: Lease,
        key: str,
        evaluation: Evaluation,
        goes_on: Callable[[ApportionError, float], bool] | None = None,
    ) -> None:
        """`record_evaluations` of one."""
        self.record_evaluations(lease, {key: evaluation}, goes_on)

    def record_evaluations(
        self,
        lease: Lease,
        done: Mapping[str, Evaluation],
        goes_on: Callable[[ApportionError, float], bool] | None = None,
    ) -> None:
        """Stores each result under its content hash, unless there is one. Raises LeaseLost.

        Args:
            goes_on: see `Database`; None: as for everything else.
        """
        rows = [
            {"key": encoding.key_bytes(key), "created_at": database_clock()}
            | encoding.evaluation_columns(evaluation)
            for key, evaluation in done.items()
        ]

        def work(connection: Connection) -> None:
            for row in rows:
                if row["error_class"] in OF_WORKERS:
                    failed = {k: row[k] for k in ("failure", "error_class", "seconds")}
                    use = {"study_id": lease.study_id, "evaluation_key": row["key"]}
                    statements.insert_new(connection, failures, use | failed)
                else:
                    statements.insert_new(connection, evaluations, row)

        self._write_leased(lease, work, goes_on=goes_on)

    def use_evaluations(self, lease: Lease, keys: Iterable[str]) -> None:
        """Says that a study needs these beside those of its trials. Raises LeaseLost."""
        rows = [
            {"study_id": lease.study_id, "evaluation_key": encoding.key_bytes(key)} for key in keys
        ]

        def work(connection: Connection) -> None:
            for row in rows:
                statements.insert_new(connection, tables.uses, row)

        self._write_leased(lease, work)

    def evaluations(
        self, keys: Iterable[str], study_id: int | None = None
    ) -> dict[str, Evaluation]:
        """Those of the evaluations that are stored, by key.

        Args:
            study_id: also what failed at the hands of this study's workers.
        """
        wanted = [encoding.key_bytes(key) for key in keys]
        failed = select(failures).where(failures.c.study_id == study_id)

        def work(connection: Connection) -> dict[str, Evaluation]:
            of_study = failures.c.evaluation_key
            rows = statements.with_keys(connection, select(evaluations), evaluations.c.key, wanted)
            found = {row.key.hex(): encoding.evaluation_of(row) for row in rows}
            if study_id is not None and len(found) < len(wanted):
                for row in statements.with_keys(connection, failed, of_study, wanted):
                    lost = Evaluation(None, None, row.failure, row.seconds, row.error_class)
                    found.setdefault(row.evaluation_key.hex(), lost)
            return found

        return self._database.read(work)

    def record_bill(self, lease: Lease, entries: Mapping[str, tuple[int, float]]) -> None:
        """Stores what this lease's workers have done so far: outcome -> (count, seconds).

        Raises LeaseLost.
        """
        key = {"study_id": lease.study_id, "epoch": lease.epoch}

        def work(connection: Connection) -> None:
            for outcome, (executions, seconds) in entries.items():
                values = {"executions": executions, "seconds": seconds}
                statements.put(connection, bills, key | {"outcome": outcome}, values)

        self._write_leased(lease, work)

    def bill(self, study_id: int) -> dict[str, tuple[int, float]]:
        """What the workers of all leases of a study have done: outcome -> (count, seconds)."""
        columns = (func.sum(bills.c.executions), func.sum(bills.c.seconds))
        query = select(bills.c.outcome, *columns).where(bills.c.study_id == study_id)
        query = query.group_by(bills.c.outcome).order_by(bills.c.outcome)
        return self._database.read(
            lambda c: {o: (int(count), float(seconds)) for o, count, seconds in c.execute(query)}
        )

    def record_measurements(self, fingerprint: str, taken: Mapping[str, Mapping[str, Any]]) -> None:
        """Stores measurements on the device `fingerprint`, except for keys that it has."""

        def work(connection: Connection) -> None:
            for key, value in taken.items():
                row = {"fingerprint": fingerprint, "key": key, "json": canonical_json(value)}
                statements.insert_new(connection, tables.measurements, row)

        self._database.write(work)

    def measurements(self, fingerprint: str) -> dict[str, dict[str, Any]]:
        """All measurements on the device `fingerprint`, by key."""
        table = tables.measurements
        query = select(table).where(table.c.fingerprint == fingerprint)
        return self._database.read(
            lambda c: {row.key: json.loads(row.json) for row in c.execute(query)}
        )
