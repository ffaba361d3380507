"""Studies and who may write to them."""

import json
import secrets
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from sqlalchemy import ColumnElement, Connection, delete, func, insert, select, update

from apportion.errors import InvalidInput
from apportion.hashing import canonical_json
from apportion.studies.database import encoding, statements, tables
from apportion.studies.database.engine import Database
from apportion.studies.database.owners import Owner
from apportion.studies.database.rows import Change, Lease, LeaseLost, StudyRow, check_name
from apportion.studies.database.tables import changes, database_clock, studies

Result = TypeVar("Result")


class Leases:
    """The store's part that knows studies, their leases and what was asked of their drivers."""

    _database: Database

    def create_study(
        self, name: str, specification: Mapping[str, Any], specification_hash: str
    ) -> StudyRow:
        """A new study, "stopped" and without owner. Raises InvalidInput if the name is taken."""
        check_name(name)
        token = secrets.token_hex(8)
        row = {
            "name": name,
            # not canonical: the order of devices and limits is the user's
            "specification": json.dumps(specification, allow_nan=False),
            "specification_hash": specification_hash,
            "created_at": database_clock(),
            "state": "stopped",
            "stage": "",
            "message": "",
            "epoch": 0,
            "lease_until": 0.0,
            "token": token,
        }
        named = studies.c.name == name

        def work(connection: Connection) -> StudyRow:
            statements.insert_new(connection, studies, row)
            mine = studies_of(connection, named, studies.c.token == token)
            if not mine:
                raise InvalidInput(f'there is a study "{name}" already; choose another name')
            return mine[0]

        return self._database.write(work)

    def find_study(self, name: str) -> StudyRow | None:
        """The study of that name, if there is one."""
        named = studies.c.name == name
        return self._database.read(lambda c: next(iter(studies_of(c, named)), None))

    def studies(self) -> list[StudyRow]:
        """All studies, the oldest first."""
        return self._database.read(lambda connection: studies_of(connection))

    def acquire(self, study_id: int, lease_seconds: float, take_over: bool = False) -> Lease:
        """The lease of a study that nobody runs, for this process.

        A lease that has expired, or whose owner is a dead process of this host, is taken over.

        Args:
            take_over: even while another lease stands; its holder writes nothing any more.

        Raises:
            InvalidInput: another lease stands, its owner is named; or the study is removed.
        """
        of_study = studies.c.id == study_id
        token = secrets.token_hex(8)
        owner = encoding.owner_text(Owner.this_process())

        def work(connection: Connection) -> Lease:
            statements.hold(connection, of_study)
            if mine := studies_of(connection, of_study, studies.c.token == token):
                return Lease(study_id, mine[0].epoch, lease_seconds, token)
            if not (found := studies_of(connection, of_study)):
                raise InvalidInput(f"study {study_id} is not there any more")
            (study,) = found
            if study.is_owned and not take_over:
                raise InvalidInput(
                    f'study "{study.name}" is being run by {study.owner}; if that one is stuck: '
                    f"resume {study.name} --take-over"
                )
            lease = Lease(study_id, study.epoch + 1, lease_seconds, token)
            row = {"owner": owner, "epoch": lease.epoch, "lease_until": _end_of(lease)}
            change = update(studies).where(of_study).values(row | {"token": token, "stop": None})
            connection.execute(change)
            return lease

        return self._database.write(work)

    def renew(self, lease: Lease) -> str | None:
        """Makes the lease stand for its `seconds` from now. Raises LeaseLost.

        Returns how the driver is asked to stop: "gently", "now", or not at all.
        """

        def work(connection: Connection) -> str | None:
            change = update(studies).where(studies.c.id == lease.study_id)
            connection.execute(change.values(lease_until=_end_of(lease)))
            asked = select(studies.c.stop).where(studies.c.id == lease.study_id)
            return connection.execute(asked).scalar()

        return self._write_leased(lease, work)

    def stop_asked(self, study_id: int) -> str | None:
        """How the driver of a study is asked to stop."""
        asked = select(studies.c.stop).where(studies.c.id == study_id)
        return self._database.read(lambda connection: connection.execute(asked).scalar())

    def ask_to_stop(self, study_id: int, how: str) -> None:
        """Asks the driver of a study to stop "gently" or "now"."""
        change = update(studies).where(studies.c.id == study_id).values(stop=how)
        self._database.write(lambda connection: connection.execute(change))

    def release(self, lease: Lease) -> None:
        """Gives the lease back; for one that is lost already there is nothing to do."""
        change = update(studies).where(statements.stands(lease))
        free = change.values(owner=None, lease_until=0.0, stop=None)
        self._database.write(lambda connection: connection.execute(free))

    def set_state(self, lease: Lease, state: str, stage: str, message: str) -> None:
        """What a study is at: "running", "stopped", "done" or "failed". Raises LeaseLost."""
        change = update(studies).where(studies.c.id == lease.study_id)
        change = change.values(state=state, stage=stage, message=message)
        self._write_leased(lease, lambda connection: connection.execute(change))

    def record_change(self, lease: Lease, first_round: int, values: Mapping[str, Any]) -> None:
        """Stores what is changed of the specification from a round on. Raises LeaseLost."""
        number = select(func.coalesce(func.max(changes.c.number), -1) + 1).where(
            changes.c.study_id == lease.study_id
        )
        row = {
            "study_id": lease.study_id,
            "first_round": first_round,
            "created_at": database_clock(),
            "change": canonical_json(values),
        }

        def work(connection: Connection) -> None:
            last = select(changes).where(changes.c.study_id == lease.study_id)
            found = connection.execute(last.order_by(changes.c.number.desc()).limit(1)).first()
            same = found is not None and (found.first_round, found.change) == (
                first_round,
                row["change"],
            )
            if not same:
                next_one = connection.execute(number).scalar_one()
                connection.execute(insert(changes).values(row | {"number": next_one}))

        self._write_leased(lease, work)

    def changes(self, study_id: int) -> list[Change]:
        """What was changed of a study's specification, in order."""
        query = select(changes).where(changes.c.study_id == study_id).order_by(changes.c.number)
        return self._database.read(
            lambda connection: [
                Change(row.number, row.first_round, row.created_at, json.loads(row.change))
                for row in connection.execute(query)
            ]
        )

    def forget(self, lease: Lease) -> bool:
        """Removes a study that has no trials yet; whether it did. Raises LeaseLost."""

        def work(connection: Connection) -> bool:
            if not statements.hold(connection, studies.c.id == lease.study_id):
                return True  # committed before the connection was lost
            _check(connection, lease)
            if statements.next_number(connection, lease.study_id) > 0:
                return False
            remove_study(connection, lease.study_id)
            return True

        return self._database.write(work)

    def _write_leased(
        self, lease: Lease, work: Callable[[Connection], Result], **options: Any
    ) -> Result:
        """A writing transaction during which nobody can take the study over."""

        def guarded(connection: Connection) -> Result:
            _check(connection, lease)
            return work(connection)

        return self._database.write(guarded, **options)


def _check(connection: Connection, lease: Lease) -> None:
    if not statements.hold(connection, statements.stands(lease)):
        raise LeaseLost(
            f"study {lease.study_id} is no longer run by this process; nothing was written"
        )


def remove_study(connection: Connection, study_id: int) -> None:
    """Deletes a study's rows; what it shares with others stays."""
    for table in reversed(tables.metadata.sorted_tables):
        if "study_id" in table.c:
            connection.execute(delete(table).where(table.c.study_id == study_id))
    connection.execute(delete(studies).where(studies.c.id == study_id))


def studies_of(connection: Connection, *conditions: ColumnElement[bool]) -> list[StudyRow]:
    """The studies that meet the conditions, the oldest first."""
    rows = connection.execute(statements.STUDIES.where(*conditions).order_by(studies.c.id))
    return [encoding.study_of(row) for row in rows]


def _end_of(lease: Lease) -> ColumnElement[float]:
    return database_clock() + lease.seconds
