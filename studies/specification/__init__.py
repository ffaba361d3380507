"""The specification of a study: its tables, its defaults and what can be wrong with it."""

from apportion.studies.specification.comparison import difference
from apportion.studies.specification.reading import load
from apportion.studies.specification.study_spec import StudySpec

__all__ = ["StudySpec", "difference", "load"]
