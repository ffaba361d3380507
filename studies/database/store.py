"""The store: everything that a study must not lose."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import ColumnElement, Connection, delete, insert, select, update

from apportion.errors import ApportionError, InvalidInput
from apportion.hashing import canonical_json
from apportion.studies.database import encoding, schema, statements, tables
from apportion.studies.database.engine import Database
from apportion.studies.database.location import database_path
from apportion.studies.database.owners import Owner
from apportion.studies.database.rows import (
    Evaluation,
    Lease,
    LeaseLost,
    NewTrial,
    StudyRow,
    TrialRow,
    check_name,
)
from apportion.studies.database.tables import database_clock, studies


class Store:
    """One database of studies, open.

    Written by one driver per study, which holds a *lease* on it; whatever writes to a study takes
    the lease and raises LeaseLost, writing nothing, once the study was leased to another or
    released. Evaluations and measurements belong to no study: they are named by what they are
    of, the first writer wins, and nothing ever changes them.

    Each method is one transaction: it sees one state of the database and, when it returns, has
    written all of its work to the disk; when it raises, or the process dies before, nothing.
    What was read is not changed by later writes. May be used by several threads.

    What is handed in as a mapping is stored as JSON: string keys, no NaN, no infinity.

    Any method may raise, naming the file: InvalidInput where it cannot be written or is no
    database of ours, ApportionError where the disk is full or failed, where another process keeps
    it locked, or where it is damaged.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    @classmethod
    def open(cls, address: str | Path) -> "Store":
        """Opens, and makes or upgrades where needed, the database at a path or "sqlite:///PATH".

        Raises InvalidInput for other addresses, network disks, the files of other programs and
        databases of a newer version of this one.
        """
        database = Database(database_path(address))
        try:
            schema.prepare(database)
        except ApportionError:
            database.close()
            raise
        return cls(database)

    def close(self) -> None:
        """Closes the connections; leases stand until released or expired."""
        self._database.close()

    # studies and their leases

    def create_study(
        self, name: str, specification: Mapping[str, Any], specification_hash: str
    ) -> StudyRow:
        """A new study, "stopped" and without owner. Raises InvalidInput if the name is taken."""
        check_name(name)
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
        }
        with self._database.writing() as connection:
            if _studies(connection, studies.c.name == name):
                raise InvalidInput(f'there is a study "{name}" already; choose another name')
            connection.execute(insert(studies).values(row))
            return _studies(connection, studies.c.name == name)[0]

    def find_study(self, name: str) -> StudyRow | None:
        """The study of that name, if there is one."""
        with self._database.reading() as connection:
            return next(iter(_studies(connection, studies.c.name == name)), None)

    def studies(self) -> list[StudyRow]:
        """All studies, the oldest first."""
        with self._database.reading() as connection:
            return _studies(connection)

    def acquire(self, study_id: int, lease_seconds: float) -> Lease:
        """The lease of a study that nobody runs, for this process.

        A lease that has expired, or whose owner is a dead process of this host, is taken over.
        Raises InvalidInput, naming the owner, while another lease stands.
        """
        of_study = studies.c.id == study_id
        with self._database.writing() as connection:
            statements.hold(connection, of_study)
            (study,) = _studies(connection, of_study)
            if study.is_owned:
                raise InvalidInput(f'study "{study.name}" is being run by {study.owner}')
            lease = Lease(study_id, study.epoch + 1, lease_seconds)
            change = update(studies).where(of_study)
            row = {"owner": encoding.owner_text(Owner.this_process()), "epoch": lease.epoch}
            connection.execute(change.values(row | {"lease_until": _end_of(lease)}))
            return lease

    def renew(self, lease: Lease) -> None:
        """Makes the lease stand for its `seconds` from now. Raises LeaseLost."""
        with self._leased(lease) as connection:
            change = update(studies).where(studies.c.id == lease.study_id)
            connection.execute(change.values(lease_until=_end_of(lease)))

    def release(self, lease: Lease) -> None:
        """Gives the lease back; for one that is lost already there is nothing to do."""
        with self._database.writing() as connection:
            change = update(studies).where(statements.stands(lease))
            connection.execute(change.values(owner=None, lease_until=0.0))

    def set_state(self, lease: Lease, state: str, stage: str, message: str) -> None:
        """What a study is at: "running", "stopped", "done" or "failed". Raises LeaseLost."""
        with self._leased(lease) as connection:
            change = update(studies).where(studies.c.id == lease.study_id)
            connection.execute(change.values(state=state, stage=stage, message=message))

    # the stages of a study

    def record_stage(
        self, lease: Lease, stage: str, round: int, output: Mapping[str, Any], seconds: float
    ) -> None:
        """Stores a finished stage's output, for good: the same once more changes nothing.

        Raises ApportionError where another output is stored already, and LeaseLost.
        """
        key = {"study_id": lease.study_id, "stage": stage, "round": round}
        values = {"output": canonical_json(output), "seconds": seconds}
        with self._leased(lease) as connection:
            statements.insert_new(connection, tables.stage_outputs, key | values)
            stored = statements.stored(connection, tables.stage_outputs.c.output, key)
            if stored != values["output"]:
                raise ApportionError(
                    f"stage {stage} of round {round} has another output stored already"
                )

    def stage_output(self, study_id: int, stage: str, round: int = 0) -> dict[str, Any] | None:
        """The output of a finished stage; None: it is not finished."""
        key = {"study_id": study_id, "stage": stage, "round": round}
        return self._json(tables.stage_outputs.c.output, key)

    def stage_seconds(self, study_id: int) -> dict[str, float]:
        """Seconds that each finished stage took, all its rounds together."""
        table = tables.stage_outputs
        query = select(table.c.stage, table.c.seconds).where(table.c.study_id == study_id)
        seconds: dict[str, float] = {}
        with self._database.reading() as connection:
            for row in connection.execute(query):
                seconds[row.stage] = seconds.get(row.stage, 0.0) + row.seconds
        return seconds

    def forget(self, lease: Lease) -> bool:
        """Removes a study that has no trials yet; whether it did. Raises LeaseLost."""
        with self._leased(lease) as connection:
            if statements.next_number(connection, lease.study_id) > 0:
                return False
            outputs = tables.stage_outputs
            connection.execute(delete(outputs).where(outputs.c.study_id == lease.study_id))
            connection.execute(delete(studies).where(studies.c.id == lease.study_id))
        return True

    # trials and the solver's state

    def record_proposals(
        self,
        lease: Lease,
        round: int,
        trials: Sequence[NewTrial],
        solver_state: Mapping[str, Any],
    ) -> range:
        """Stores what a solver proposed together with its state afterwards.

        Returns the numbers given to the trials: in order, after those that the study has.
        Raises LeaseLost.
        """
        key = {"study_id": lease.study_id, "round": round}
        state = {"json": canonical_json(solver_state)}
        with self._leased(lease) as connection:
            first = statements.next_number(connection, lease.study_id)
            rows = [
                key | {"number": number} | encoding.trial_columns(trial)
                for number, trial in enumerate(trials, first)
            ]
            if rows:
                connection.execute(insert(tables.trials), rows)
            statements.put(connection, tables.solver_states, key, state)
        return range(first, first + len(rows))

    def trials(self, study_id: int, round: int | None = None) -> list[TrialRow]:
        """The trials of a study, or of one of its rounds, by number."""
        query = select(tables.trials).where(tables.trials.c.study_id == study_id)
        if round is not None:
            query = query.where(tables.trials.c.round == round)
        with self._database.reading() as connection:
            rows = connection.execute(query.order_by(tables.trials.c.number))
            return [encoding.trial_of(row) for row in rows]

    def solver_state(self, study_id: int, round: int) -> dict[str, Any] | None:
        """The state stored with the last proposals of a round; None: there were none."""
        return self._json(tables.solver_states.c.json, {"study_id": study_id, "round": round})

    # what all studies share

    def record_evaluation(self, key: str, evaluation: Evaluation) -> None:
        """Stores a result under its content hash, unless there is one."""
        row = {"key": key, "created_at": database_clock()} | encoding.evaluation_columns(evaluation)
        with self._database.writing() as connection:
            statements.insert_new(connection, tables.evaluations, row)

    def evaluations(self, keys: Iterable[str]) -> dict[str, Evaluation]:
        """Those of the evaluations that are stored, by key."""
        table = tables.evaluations
        with self._database.reading() as connection:
            rows = statements.with_keys(connection, select(table), table.c.key, keys)
            return {row.key: encoding.evaluation_of(row) for row in rows}

    def record_measurements(self, fingerprint: str, taken: Mapping[str, Mapping[str, Any]]) -> None:
        """Stores measurements on the device `fingerprint`, except for keys that it has."""
        with self._database.writing() as connection:
            for key, value in taken.items():
                row = {"fingerprint": fingerprint, "key": key, "json": canonical_json(value)}
                statements.insert_new(connection, tables.measurements, row)

    def measurements(self, fingerprint: str) -> dict[str, dict[str, Any]]:
        """All measurements on the device `fingerprint`, by key."""
        table = tables.measurements
        query = select(table).where(table.c.fingerprint == fingerprint)
        with self._database.reading() as connection:
            return {row.key: json.loads(row.json) for row in connection.execute(query)}

    @contextmanager
    def _leased(self, lease: Lease) -> Iterator[Connection]:
        """A writing transaction during which nobody can take the study over."""
        with self._database.writing() as connection:
            if not statements.hold(connection, statements.stands(lease)):
                raise LeaseLost(
                    f"study {lease.study_id} is no longer run by this process; nothing was written"
                )
            yield connection

    def _json(self, column: Any, key: Mapping[str, Any]) -> dict[str, Any] | None:
        with self._database.reading() as connection:
            text = statements.stored(connection, column, key)
        return None if text is None else dict(json.loads(text))


def _studies(connection: Connection, *conditions: ColumnElement[bool]) -> list[StudyRow]:
    rows = connection.execute(statements.STUDIES.where(*conditions).order_by(studies.c.id))
    return [encoding.study_of(row) for row in rows]


def _end_of(lease: Lease) -> ColumnElement[float]:
    return database_clock() + lease.seconds
