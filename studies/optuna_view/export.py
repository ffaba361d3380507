"""A study's finished trials in an Optuna database, for whatever reads those."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import optuna
from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.storages import RDBStorage
from optuna.storages._rdb.models import BaseModel
from optuna.study import StudyDirection
from sqlalchemy import URL, create_engine, inspect
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from apportion.errors import ApportionError, InvalidInput
from apportion.studies.database.rows import StudyRow
from apportion.studies.database.store import Store
from apportion.studies.optuna_view.mapping import MARK, NUMBER, Mapped, mapped, mark

OF_OPTUNA = "version_info"
"""A table that every finished Optuna database has, and no other that we know."""
EXAMPLE = 'write for example "sqlite:///trials.db"'


def export_study(store: Store, study: StudyRow, url: str) -> int:
    """Add what an Optuna study of the same name lacks of a study's finished trials.

    What is in flight is left out, so nothing there is ever "running". Each trial is written whole
    or not at all, with its number as a user attribute: done again, also after a kill, only what is
    new is added, in the order of the numbers. One export at a time may write to a URL.

    Args:
        url: of a database that is empty or Optuna's, in SQLAlchemy's words; a file is made.

    Returns:
        How many trials were added.

    Raises:
        InvalidInput: the database cannot be opened, belongs to another program, or holds another
            study of this name.
        ApportionError: it was lost while it was written; what is written stays.
    """
    view, address = mapped(store, study), _address(url)
    with _opening(address):
        target = _target(address, study, view)
        known = {trial.user_attrs.get(NUMBER) for trial in target.get_trials(deepcopy=False)}
    trials = [trial for trial in store.trials(study.id) if trial.number not in known]
    found = store.evaluations({trial.evaluation_key for trial in trials}, study.id)
    finished = [trial for trial in trials if trial.evaluation_key in found]
    try:
        for trial in finished:
            target.add_trial(view.finished(trial, found[trial.evaluation_key]))
    except (SQLAlchemyError, StorageInternalError) as error:
        raise ApportionError(f"{address}: {_told(error)}; do it again to go on") from error
    return len(finished)


def _address(url: str) -> URL:
    """What a URL means; shown as text it hides the password."""
    try:
        address = make_url(url)
    except (ArgumentError, ValueError) as error:
        raise InvalidInput(f"--optuna: no database address; {EXAMPLE}") from error
    if address.get_backend_name() == "sqlite" and address.database in (None, "", ":memory:"):
        raise InvalidInput(f"{address}: a database in memory is lost at the end; {EXAMPLE}")
    return address


def _target(address: URL, study: StudyRow, view: Mapped) -> optuna.Study:
    """The study to add to, made where there is none."""
    _check_tables(address)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    directions = [StudyDirection.MINIMIZE] * len(view.metric_names)
    target = optuna.create_study(
        storage=RDBStorage(address.render_as_string(hide_password=False)),
        study_name=study.name,
        directions=directions,
        load_if_exists=True,
    )
    marked = target.user_attrs.get(MARK)
    # killed before it was marked: nothing of anybody's is in it
    unborn = not target.user_attrs and not target.get_trials(deepcopy=False)
    if target.directions != directions or (marked != mark(study) and not unborn):
        raise InvalidInput(f'{address}: holds another study "{study.name}"; name another database')
    if marked is None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            target.set_metric_names(view.metric_names)
        target.set_user_attr(MARK, mark(study))
    return target


def _check_tables(address: URL) -> None:
    """Optuna would write its tables into whatever is there, a database of ours too."""
    engine = create_engine(address)
    try:
        tables = set(inspect(engine).get_table_names())
    finally:
        engine.dispose()
    # killed while it was made, an Optuna database has some of its tables and no others
    if OF_OPTUNA not in tables and tables - BaseModel.metadata.tables.keys():
        raise InvalidInput(
            f"{address}: is the database of another program; name one that is empty or Optuna's"
        )


@contextmanager
def _opening(address: URL) -> Iterator[None]:
    try:
        yield
    except InvalidInput:
        raise
    # RuntimeError: the tables of another version of Optuna
    except (SQLAlchemyError, StorageInternalError, ImportError, RuntimeError) as error:
        raise InvalidInput(f"{address}: cannot be used: {_told(error)}; {EXAMPLE}") from error


def _told(error: Exception) -> str:
    """The cause in one line, without the statement that met it."""
    cause = error.__cause__ if isinstance(error, StorageInternalError) else error
    return " ".join(str(getattr(cause, "orig", None) or cause or error).split()).rstrip(".")
