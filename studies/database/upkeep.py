"""What is removed from a database for good, and when files that studies share may be touched."""

import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from sqlalchemy import (
    ColumnElement,
    Connection,
    LargeBinary,
    Table,
    Text,
    delete,
    exists,
    func,
    literal,
    select,
    true,
)

from apportion.errors import ApportionError, InvalidInput
from apportion.studies.database import integrity, tables
from apportion.studies.database.engine import DatabaseAway
from apportion.studies.database.integrity import Checked
from apportion.studies.database.leases import remove_study, studies_of
from apportion.studies.database.rows import StudyRow
from apportion.studies.database.shared import Shared
from apportion.studies.database.sqlite import BEGIN, SQLite
from apportion.studies.database.tables import evaluations, layouts, studies, trials, uses

NUMBER_BYTES = 8
Result = TypeVar("Result")


class InUse(InvalidInput):
    """A process runs a study that was to be left alone meanwhile."""


@dataclass(frozen=True)
class Rows:
    """Rows of one kind: how many, and how long their values are in bytes."""

    count: int
    bytes: int


class Upkeep(Shared):
    """The store's part that removes what is no longer needed, and looks whether all is whole."""

    def deletable(self, study_id: int) -> dict[str, Rows]:
        """What `delete_study` would remove now, by kind. Raises InUse."""

        def work(connection: Connection) -> dict[str, Rows]:
            _refuse_held(connection, studies.c.id == study_id)
            return _of_study(connection, study_id) | _garbage(connection, study_id)

        return self._database.read(work)

    def delete_study(self, study_id: int) -> dict[str, Rows]:
        """Removes a study and what it alone has needed, evaluations too. Raises InUse.

        Returns what was removed, by kind: "study", "trials", "evaluations", "layouts".
        """

        def work(connection: Connection) -> dict[str, Rows]:
            _write_alone(connection)
            _refuse_held(connection, studies.c.id == study_id)
            removed = _of_study(connection, study_id)
            remove_study(connection, study_id)
            return removed | _remove_garbage(connection)

        return self._database.write(work)

    def garbage(self) -> dict[str, Rows]:
        """Rows that no study refers to, by kind: "evaluations", "layouts"."""
        return self._database.read(_garbage)

    def remove_garbage(self) -> dict[str, Rows]:
        """Removes those rows; what running studies need is never among them.

        A study names an evaluation, by a trial or as one that it uses, before it looks for it.
        """

        def work(connection: Connection) -> dict[str, Rows]:
            _write_alone(connection)
            return _remove_garbage(connection)

        return self._database.write(work)

    def while_idle(self, work: Callable[[], Result]) -> Result:
        """Do `work`, which may read the store; until it returns nobody can begin to run a study.

        Raises InUse where a study is being run.
        """

        def guarded(connection: Connection) -> Result:
            _write_alone(connection)
            _refuse_held(connection, true())
            return work()

        return self._database.write(guarded)

    def compact(self) -> int | None:
        """Gives the room of removed rows back to the disk; by how many bytes the file is shorter.

        None: a server's database, which does it by itself. Raises InUse where a study is being run:
        writers wait meanwhile.
        """
        server = self._database.server
        if not isinstance(server, SQLite):
            return None

        def vacuum(connection: Connection) -> None:
            connection.exec_driver_sql("VACUUM")
            connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")

        self.while_idle(lambda: None)
        before = _size(server.path)
        outside: dict[str, object] = {BEGIN: ""}
        self._database._transact(vacuum, outside, self._database.goes_on)
        return max(0, before - _size(server.path))

    def check(self) -> Checked:
        """Reads every row and decodes it."""
        found = Checked()
        for part in (
            lambda c: self._database.server.problems(c),
            lambda c: integrity.read_all(c, found),
        ):
            try:
                found.problems += self._database.read(part)
            except DatabaseAway:
                raise
            except ApportionError as error:
                found.problems.append(str(error))
        return found


def may_write(study: StudyRow) -> bool:
    """Whether a process may still believe that it runs the study.

    A process of this host that was stopped for a while goes on when it wakes: a lease that has
    expired stands until another is given out.
    """
    if study.owner is None or study.is_owned:
        return study.owner is not None
    return study.owner.host == socket.gethostname() and not study.owner.is_dead()


def _size(path: Path) -> int:
    # what was written last is in the log only
    files = (path, path.with_name(f"{path.name}-wal"))
    return sum(file.stat().st_size for file in files if file.exists())


def _refuse_held(connection: Connection, condition: ColumnElement[bool]) -> None:
    for study in studies_of(connection, condition):
        if may_write(study):
            raise InUse(f'study "{study.name}" is being run by {study.owner}')


def _write_alone(connection: Connection) -> None:
    # Whoever writes to a study locks its row first; SQLite has locked the whole file.
    if connection.dialect.name == "postgresql":
        connection.exec_driver_sql("LOCK TABLE studies IN EXCLUSIVE MODE")


def _of_study(connection: Connection, study_id: int) -> dict[str, Rows]:
    own = [table for table in tables.metadata.sorted_tables if "study_id" in table.c]
    parts = [_rows(connection, table, table.c.study_id == study_id) for table in own]
    counted = dict(zip(own, parts, strict=True))
    row = _rows(connection, studies, studies.c.id == study_id)
    rest = sum(found.bytes for table, found in counted.items() if table is not trials)
    return {"study": Rows(row.count, row.bytes + rest), "trials": counted[trials]}


def _garbage(connection: Connection, but: int | None = None) -> dict[str, Rows]:
    """What nobody names, or nobody but the study `but`."""
    return {
        "evaluations": _rows(connection, evaluations, _unnamed(but)),
        "layouts": _rows(connection, layouts, _unread(but)),
    }


def _remove_garbage(connection: Connection) -> dict[str, Rows]:
    found = _garbage(connection)
    connection.execute(delete(evaluations).where(_unnamed(None)))
    connection.execute(delete(layouts).where(_unread(None)))
    return found


def _unnamed(but: int | None) -> ColumnElement[bool]:
    def named(table: Table) -> ColumnElement[bool]:
        same = table.c.evaluation_key == evaluations.c.key
        return exists().where(same, true() if but is None else table.c.study_id != but)

    return ~named(trials) & ~named(uses)


def _unread(but: int | None) -> ColumnElement[bool]:
    of_others = true() if but is None else trials.c.study_id != but
    return layouts.c.id.not_in(select(trials.c.layout_id).where(of_others).distinct())


def _rows(connection: Connection, table: Table, condition: ColumnElement[bool]) -> Rows:
    size: ColumnElement[int] = literal(0)
    for column in table.c:
        is_long = isinstance(column.type, (Text, LargeBinary))
        size = size + (func.coalesce(func.length(column), 0) if is_long else NUMBER_BYTES)
    query = select(func.count(), func.coalesce(func.sum(size), 0)).select_from(table)
    count, total = connection.execute(query.where(condition)).one()
    return Rows(int(count), int(total))
