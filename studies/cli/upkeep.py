"""Commands that keep a home in order: delete, gc, bank gc, db upgrade, db check."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from apportion.errors import InvalidInput
from apportion.studies.cli.beginning import Json
from apportion.studies.cli.display import ConsoleDisplay
from apportion.studies.cli.records import DatabaseCheck, Removal
from apportion.studies.cli.running import Name
from apportion.studies.cli.session import Session
from apportion.units import format_bytes

if TYPE_CHECKING:
    from apportion.studies.database.store import Store
    from apportion.studies.home import Home

DryRun = Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")]

db = typer.Typer(
    name="db",
    help="Look after the database.",
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


bank = typer.Typer(
    name="bank",
    help="Look after the bank of compressed weights.",
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def delete(
    context: typer.Context,
    name: Name,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    as_json: Json = False,
) -> None:
    """Remove a study and what no other study needs."""
    from apportion.studies import upkeep
    from apportion.studies.study import Study

    session = context.ensure_object(Session)
    Study.open(name, session.home, session.home.database)
    store, display = upkeep.stored(session.home), session.display()
    try:
        if not yes:
            removal = upkeep.delete(session.home, store, name, dry_run=True)
            if not _confirmed(display, removal, as_json):
                return
        removal = upkeep.delete(session.home, store, name)
    finally:
        store.close()
    _show(display, removal, as_json)


def gc(context: typer.Context, dry_run: DryRun = False, as_json: Json = False) -> None:
    """Remove what no study needs, and what can be made again."""
    from apportion.studies import upkeep

    _collect(context, upkeep.collect, dry_run, as_json)


@bank.command("gc")
def bank_gc(context: typer.Context, dry_run: DryRun = False, as_json: Json = False) -> None:
    """Remove compressed weights that no study needs, and nothing else."""
    from apportion.studies import upkeep

    _collect(context, upkeep.collect_bank, dry_run, as_json)


def _collect(
    context: typer.Context,
    collect: "Callable[[Home, Store, bool], Removal]",
    dry_run: bool,
    as_json: bool,
) -> None:
    from apportion.studies import upkeep

    session = context.ensure_object(Session)
    store = upkeep.stored(session.home)
    try:
        removal = collect(session.home, store, dry_run)
    finally:
        store.close()
    _show(session.display(), removal, as_json)


@db.command("upgrade")
def upgrade(context: typer.Context) -> None:
    """Bring an older database up to date, after a backup."""
    from apportion.studies import upkeep
    from apportion.studies.database import location
    from apportion.studies.database import upgrade as upgrade_database

    session = context.ensure_object(Session)
    upkeep.refuse_without(session.home)
    done = upgrade_database(session.home.database)
    display, place = session.display(), location.located(session.home.database)
    shown = str(place) if isinstance(place, Path) else location.shown(place)
    if done.before == done.after:
        display.line(f" {shown} is up to date (revision {done.after})")
        return
    display.line(f" {shown}: revision {done.before or 'none'} -> {done.after}")
    if done.backup is not None:
        display.line(f" backup {done.backup}")


@db.command("check")
def check(context: typer.Context, as_json: Json = False) -> None:
    """Read all that is stored, and look for what is missing or damaged."""
    session = context.ensure_object(Session)
    from apportion.studies import upkeep

    store = upkeep.stored(session.home)
    try:
        with session.working() as display:
            from apportion.studies.checking import check_database

            found = check_database(session.home, store)
            if as_json:
                display.json(found)
            else:
                _show_check(display, found)
    finally:
        store.close()
    if found["problems"]:
        raise typer.Exit(1)


def _confirmed(display: ConsoleDisplay, removal: Removal, as_json: bool) -> bool:
    """Show what would go, and ask. Raises InvalidInput where nobody can be asked."""
    name = removal["study"]
    if not sys.stdin.isatty():
        raise InvalidInput(f"delete {name}: there is nobody to ask here; to delete it: --yes")
    if not as_json:
        _show(display, removal, as_json=False)
    try:
        # stdout may be a pipe
        confirmed = typer.confirm(f" delete study {name}?", err=True)
    except typer.Abort as abort:
        raise KeyboardInterrupt from abort
    if not confirmed and not as_json:
        display.line(" nothing was deleted")
    return confirmed


def _show(display: ConsoleDisplay, removal: Removal, as_json: bool) -> None:
    if as_json:
        display.json(removal)
        return
    rows = [
        [kind, f"{amount['count']:,}", format_bytes(amount["bytes"])]
        for kind, amount in removal["removed"].items()
    ]
    name, size = removal["study"], format_bytes(removal["bytes"])
    if not rows:
        total = "there is nothing to remove"
    elif removal["dry_run"]:
        total = f"{size} would be removed" + (f" with study {name}" if name else "")
    else:
        total = f"deleted study {name}: {size} freed" if name else f"{size} freed"
    notes = [total]
    if removal["compacted"]:
        notes.append(f"the database's file is {format_bytes(removal['compacted'])} shorter")
    notes += [f"left alone: {text}" for text in removal["left"]]
    if rows:
        display.table(["what", "count", "size"], rows, notes)
        return
    for note in notes:
        display.line(f" {note}")


def _show_check(display: ConsoleDisplay, found: DatabaseCheck) -> None:
    for problem in found["problems"]:
        display.line(f" {problem}")
    if not found["problems"]:
        counts = [
            f"{found['studies']:,} {'study' if found['studies'] == 1 else 'studies'}",
            f"{found['trials']:,} trials",
            f"{found['evaluations']:,} evaluations",
            f"{found['entries']:,} bank entries",
        ]
        display.line(f" {', '.join(counts)}: all whole")
