"""Where studies are remembered: the only door to SQL."""

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
from apportion.studies.database.store import Store

__all__ = [
    "Evaluation",
    "Lease",
    "LeaseLost",
    "NewTrial",
    "Owner",
    "Store",
    "StudyRow",
    "TrialRow",
    "check_name",
]
