"""How far studies are: what `list` and `status` tell of them. Imports nothing heavy."""

import datetime

from apportion.studies.changes import in_force, told
from apportion.studies.cli.records import Status, StudyRow
from apportion.studies.database.rows import StudyRow as StoredStudy
from apportion.studies.database.shared import OF_WORKERS
from apportion.studies.database.store import Store
from apportion.studies.running import message_of
from apportion.studies.specification import StudySpec

FINISHED, RUNNING = "finished", "running"
WASTED = (*OF_WORKERS, "cancelled")


def study_row(store: Store, row: StoredStudy) -> StudyRow:
    """A stored study as `list` prints it."""
    spec = in_force(StudySpec(**row.specification), store.changes(row.id))
    message = message_of(row)
    state = {"done": FINISHED, "failed": "failed"}.get(row.state, "interrupted")
    if row.is_owned:  # also while its model is being opened
        state = RUNNING
    best = message.get("best")
    created = datetime.datetime.fromtimestamp(row.created_at, datetime.UTC)
    return StudyRow(
        name=row.name,
        state=state,
        stage=row.stage or None,
        tokens_spent=int(message.get("tokens", 0)),
        tokens=spec.search.tokens,
        unit=spec.data.unit,
        best_loss=best if isinstance(best, float) else None,
        created=created.isoformat(timespec="seconds"),
    )


def status_of(store: Store, row: StoredStudy, spec: StudySpec) -> Status:
    """A stored study as `status` prints it; `spec` is what is in force."""
    message, bill, listed = message_of(row), store.bill(row.id), study_row(store, row)
    is_searching = (listed["state"], listed["stage"]) == (RUNNING, "search")
    return Status(
        **listed,
        loss=loss_name(spec),
        workers=int(message.get("workers", 1)),
        recoveries=sum(bill[outcome][0] for outcome in OF_WORKERS if outcome in bill),
        wasted_seconds=sum(bill[outcome][1] for outcome in WASTED if outcome in bill),
        bill={outcome: {"executions": n, "seconds": s} for outcome, (n, s) in bill.items()},
        changes=[told(change.values) for change in store.changes(row.id)],
        cached=int(message.get("cached", 0)),
        seconds_left=message.get("seconds_left") if is_searching else None,
    )


def loss_name(spec: StudySpec) -> str:
    """The objective as tables name it."""
    names = {"kl": "KL", "perplexity": "perplexity", "accuracy": "error rate"}
    return names.get(spec.objective.loss, "loss")
