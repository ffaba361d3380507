"""What a study has come to: the outputs of its stages, its trials, its solver's answers."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, insert, select

from apportion.errors import ApportionError
from apportion.hashing import canonical_json
from apportion.studies.database import encoding, statements, tables
from apportion.studies.database.leases import Leases
from apportion.studies.database.rows import Layout, Lease, NewTrial, TrialRow
from apportion.studies.database.tables import layouts, solver_answers


class Trials(Leases):
    """The store's part that keeps what the stages of a study give."""

    def record_stage(
        self, lease: Lease, stage: str, round: int, output: Mapping[str, Any], seconds: float
    ) -> None:
        """Stores a finished stage's output, for good: the same once more changes nothing.

        Raises ApportionError where another output is stored already, and LeaseLost.
        """
        key = {"study_id": lease.study_id, "stage": stage, "round": round}
        values = {"output": canonical_json(output), "seconds": seconds}

        def work(connection: Connection) -> None:
            statements.insert_new(connection, tables.stage_outputs, key | values)
            stored = statements.stored(connection, tables.stage_outputs.c.output, key)
            if stored != values["output"]:
                raise ApportionError(
                    f"stage {stage} of round {round} has another output stored already"
                )

        self._write_leased(lease, work)

    def stage_output(self, study_id: int, stage: str, round: int = 0) -> dict[str, Any] | None:
        """The output of a finished stage; None: it is not finished."""
        key = {"study_id": study_id, "stage": stage, "round": round}
        column = tables.stage_outputs.c.output
        text = self._database.read(lambda c: statements.stored(c, column, key))
        return None if text is None else dict(json.loads(text))

    def stage_rounds(self, study_id: int, stage: str) -> list[int]:
        """The rounds in which a stage is finished, in order."""
        table = tables.stage_outputs
        query = select(table.c.round).where(table.c.study_id == study_id, table.c.stage == stage)
        query = query.order_by(table.c.round)
        return self._database.read(lambda c: list(c.execute(query).scalars()))

    def stage_seconds(self, study_id: int) -> dict[str, float]:
        """Seconds that each finished stage took, all its rounds together."""
        table = tables.stage_outputs
        query = select(table.c.stage, table.c.seconds).where(table.c.study_id == study_id)

        def work(connection: Connection) -> dict[str, float]:
            seconds: dict[str, float] = {}
            for row in connection.execute(query):
                seconds[row.stage] = seconds.get(row.stage, 0.0) + row.seconds
            return seconds

        return self._database.read(work)

    def record_proposals(
        self,
        lease: Lease,
        round: int,
        first: int,
        layout: Layout,
        trials: Sequence[NewTrial],
        answers: Mapping[str, Any],
    ) -> range:
        """Stores what a solver proposed together with what it computed for that.

        Args:
            first: the number of the first of them: how many trials the study has.
            layout: the options and costs that the trials are made of.
            answers: question -> answer, of those that are not stored yet.

        Returns:
            The numbers of the trials.

        Raises:
            ApportionError: the study has another number of trials.
            LeaseLost: another process runs the study.
        """
        numbers = range(first, first + len(trials))
        key = {"study_id": lease.study_id, "round": round}

        def work(connection: Connection) -> None:
            next_one = statements.next_number(connection, lease.study_id)
            if trials and next_one == numbers.stop:
                return  # committed before the connection was lost
            if next_one != first:
                raise ApportionError(
                    f"study {lease.study_id} has {next_one} trials, {first} were expected"
                )
            packed = key | {"layout_id": _layout_id(connection, layout)}
            rows = [
                packed | {"number": number} | encoding.trial_columns(trial, layout)
                for number, trial in zip(numbers, trials, strict=True)
            ]
            if rows:
                connection.execute(insert(tables.trials), rows)
            for question, answer in answers.items():
                row = key | {"question": question, "answer": canonical_json(answer)}
                statements.insert_new(connection, solver_answers, row)

        self._write_leased(lease, work)
        return numbers

    def trials(self, study_id: int, round: int | None = None, first: int = 0) -> list[TrialRow]:
        """The trials of a study, or of one of its rounds, by number, from number `first` on."""
        query = select(tables.trials).where(
            tables.trials.c.study_id == study_id, tables.trials.c.number >= first
        )
        if round is not None:
            query = query.where(tables.trials.c.round == round)

        def work(connection: Connection) -> list[TrialRow]:
            rows = connection.execute(query.order_by(tables.trials.c.number)).all()
            ids = sorted({row.layout_id for row in rows})
            found = connection.execute(select(layouts).where(layouts.c.id.in_(ids)))
            known = {row.id: encoding.layout_of(row.layout) for row in found}
            return [encoding.trial_of(row, known) for row in rows]

        return self._database.read(work)

    def trial_count(self, study_id: int) -> int:
        """How many trials a study has: the number of its next one."""
        return self._database.read(lambda c: statements.next_number(c, study_id))

    def solver_answers(self, study_id: int, round: int) -> dict[str, Any]:
        """What the solver of a round has computed so far: question -> answer."""
        query = select(solver_answers).where(
            solver_answers.c.study_id == study_id, solver_answers.c.round == round
        )

        def work(connection: Connection) -> dict[str, Any]:
            return {row.question: json.loads(row.answer) for row in connection.execute(query)}

        return self._database.read(work)


def _layout_id(connection: Connection, layout: Layout) -> int:
    columns = encoding.layout_columns(layout)
    found = select(layouts.c.id).where(layouts.c.hash == columns["hash"])
    number = connection.execute(found).scalar()
    if number is None:
        statements.insert_new(connection, layouts, columns)
        number = connection.execute(found).scalar_one()
    return int(number)
