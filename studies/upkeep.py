"""Deleting a study, and collecting what none needs: rows first, then files.

Files that studies share are removed only while no study is being run, and none can begin: a
running one relies on entries of the bank that it names only when all of them are there. A process
that dies between rows and files leaves files that `collect` removes, never rows without files.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

from apportion.errors import InvalidInput
from apportion.studies.cli.records import Amount, Removal
from apportion.studies.database.location import located, without_password
from apportion.studies.database.rows import StudyRow
from apportion.studies.database.store import Store
from apportion.studies.database.upkeep import InUse, Rows
from apportion.studies.home import Home

DATABASES = "databases"
"""A file of the bank: the addresses of other databases whose studies use it, a line each."""
STAGE = "compress"
Paths = dict[str, list[Path]]


def refuse_without(home: Home) -> None:
    """Make no database where there is none to look after. Raises InvalidInput."""
    if home.database_url is None and not (home.path / "studies.db").is_file():
        raise InvalidInput(f"no studies in {home.path}")


def stored(home: Home) -> Store:
    """The store of a home that has one. Raises InvalidInput."""
    refuse_without(home)
    return Store.open(home.database)


def delete(home: Home, store: Store, name: str, dry_run: bool = False) -> Removal:
    """Remove a study, and what no other needs.

    Args:
        dry_run: only say what would be removed.

    Raises:
        InvalidInput: there is no such study, or a process runs it.
    """
    study = store.find_study(name)
    if study is None:
        raise InvalidInput(f'no study "{name}" in {home.path}')
    try:
        rows = (store.deletable if dry_run else store.delete_study)(study.id)
    except InUse as error:
        stop = home.command(f"stop {name}")
        raise InvalidInput(f"{error}; stop it first: {stop}") from error
    removal = _begun(name, dry_run, rows)
    logs = [home.log(name), home.log(f"{name}.out")]
    _take(removal, {"log": logs, "spool": _inside(home.spool(name))})
    # once it is deleted, the name may be another study's
    but = study.id if dry_run else None

    def shared() -> Paths:
        lists = list(home.cache.glob("bank-*.json"))
        return {"bank": _unneeded(home, store, but), "cache": lists}

    _take_shared(removal, home, store, shared)
    return removal


def collect(home: Home, store: Store, dry_run: bool = False) -> Removal:
    """Remove what no study needs, and the cache. Raises InvalidInput like the store.

    Args:
        dry_run: only say what would be removed.
    """
    removal = _begun(None, dry_run, store.garbage() if dry_run else store.remove_garbage())

    def shared() -> Paths:
        names = {study.name for study in store.studies()}
        spools = [f for f in home.spool("").glob("*") if f.name not in names]
        cached = _inside(home.cache)
        parts = [file for file in [*_inside(home.bank), *cached] if file.suffix == ".part"]
        return {
            "bank": _unneeded(home, store),
            "parts": parts,
            "cache": [file for file in cached if file not in set(parts)],
            "spool": [file for folder in spools for file in _inside(folder)],
        }

    _take_shared(removal, home, store, shared)
    if not dry_run:
        _compact(removal, store)
    return removal


def collect_bank(home: Home, store: Store, dry_run: bool = False) -> Removal:
    """Remove entries of the bank that no study needs, and nothing else; arguments as `collect`."""
    removal = _begun(None, dry_run, {})

    def shared() -> Paths:
        parts = [file for file in _inside(home.bank) if file.suffix == ".part"]
        return {"bank": _unneeded(home, store), "parts": parts}

    _take_shared(removal, home, store, shared)
    return removal


def note_database(home: Home) -> None:
    """Remember that studies of a database that is not the home's own use its bank.

    Raises OSError where the bank cannot be written.
    """
    if home.database_url is None or _is_own(home):
        return
    file, line = home.bank / DATABASES, without_password(home.database)
    if line not in _noted(home):
        with file.open("a", encoding="utf-8") as notes:
            notes.write(f"{line}\n")


def named_entries(store: Store, study: StudyRow) -> Mapping[str, Mapping[str, str]] | None:
    """Site -> option -> entry of the bank that a study names; None: it has not come to that."""
    output = store.stage_output(study.id, STAGE)
    return None if output is None else dict(output["index"])


def _begun(name: str | None, dry_run: bool, rows: Mapping[str, Rows]) -> Removal:
    removed = {kind: Amount(count=r.count, bytes=r.bytes) for kind, r in rows.items() if r.count}
    total = sum(amount["bytes"] for amount in removed.values())
    return Removal(
        study=name, dry_run=dry_run, removed=removed, bytes=total, compacted=None, left=[]
    )


def _take(removal: Removal, found: Paths) -> None:
    """Remove the files, or only count them."""
    for kind, paths in found.items():
        sizes = [path.stat().st_size for path in paths if path.is_file()]
        if not removal["dry_run"]:
            for path in paths:
                path.unlink(missing_ok=True)
        if sizes:
            removal["removed"][kind] = Amount(count=len(sizes), bytes=sum(sizes))
            removal["bytes"] += sum(sizes)


def _take_shared(removal: Removal, home: Home, store: Store, found: Callable[[], Paths]) -> None:
    others = _users(home)
    if others:
        removal["left"].append(
            f"bank and cache of {home.path}: studies of another database may use them: {others}"
        )
        return
    try:
        store.while_idle(lambda: _take(removal, found()))
    except InUse as error:
        removal["left"].append(f"bank and cache: {error}; {home.command('gc')} removes them later")


def _compact(removal: Removal, store: Store) -> None:
    try:
        removal["compacted"] = store.compact()
    except InUse as error:
        removal["left"].append(f"room in the database's file: {error}")


def _unneeded(home: Home, store: Store, but: int | None = None) -> list[Path]:
    """Entries of the bank that no study names, nor one that still makes them may need."""
    needed: set[str] = set()
    since = float("inf")
    for study in store.studies():
        if study.id == but:
            continue
        index = named_entries(store, study)
        if index is None:
            since = min(since, study.created_at)
        else:
            needed.update(key for keys in index.values() for key in keys.values())
    entries = home.bank.glob("??/*.safetensors")
    return [e for e in entries if e.stem not in needed and e.stat().st_mtime < since]


def _inside(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def _users(home: Home) -> str:
    """The databases that may use the bank beside the one at hand; "": none."""
    if not _is_own(home):
        return str(home.path / "studies.db")
    return ", ".join(_noted(home))


def _noted(home: Home) -> list[str]:
    file = home.bank / DATABASES
    return file.read_text(encoding="utf-8").splitlines() if file.is_file() else []


def _is_own(home: Home) -> bool:
    own = Home(home.path)
    if home.database_url is None:
        return True
    return home.path.is_dir() and located(home.database) == located(own.database)
