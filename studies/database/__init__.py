"""Where studies are remembered: the only door to SQL."""

from apportion.studies.database.engine import DatabaseAway
from apportion.studies.database.owners import Owner
from apportion.studies.database.rows import (
    Change,
    Evaluation,
    Layout,
    Lease,
    LeaseLost,
    NewTrial,
    StudyRow,
    TrialRow,
    check_name,
)
from apportion.studies.database.store import Store, upgrade

__all__ = [
    "Change",
    "DatabaseAway",
    "Evaluation",
    "Layout",
    "Lease",
    "LeaseLost",
    "NewTrial",
    "Owner",
    "Store",
    "StudyRow",
    "TrialRow",
    "check_name",
    "upgrade",
]
