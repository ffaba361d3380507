"""Whether a database can be read to its last row, and the bank holds what its studies name."""

from collections import Counter

from apportion.errors import ApportionError
from apportion.spaces.bank import Bank
from apportion.studies.cli.records import DatabaseCheck
from apportion.studies.database.store import Store
from apportion.studies.home import Home
from apportion.studies.upkeep import named_entries


def check_database(home: Home, store: Store) -> DatabaseCheck:
    """Read all that is stored; what is wrong is a line of `problems`. Raises like the store."""
    found = store.check()
    entries, problems = _check_bank(home, store) if not found.problems else (0, [])
    return DatabaseCheck(
        studies=found.studies,
        trials=found.trials,
        evaluations=found.evaluations,
        entries=entries,
        problems=[*found.problems, *problems],
    )


def _check_bank(home: Home, store: Store) -> tuple[int, list[str]]:
    """How many entries are whole, and what is wrong with the others."""
    bank, whole = Bank(home.bank), set[str]()
    missing: Counter[str] = Counter()
    damaged: dict[str, str] = {}
    named: Counter[str] = Counter()
    for study in store.studies():
        index = named_entries(store, study) or {}
        for key in {key for keys in index.values() for key in keys.values()}:
            named[study.name] += 1
            if not bank.has(key):
                missing[study.name] += 1
            elif key not in whole and key not in damaged:
                try:
                    bank.get(key)
                    whole.add(key)
                except ApportionError as error:
                    damaged[key] = str(error)
    lines = [
        f"study {name}: {count} of {named[name]} bank entries are not in {home.bank}"
        for name, count in missing.items()
    ]
    return len(whole), [*lines, *damaged.values()]
