"""The application: global options, the commands, and how each way of ending is told."""

import io
import sys
from collections.abc import Sequence
from typing import Annotated

import typer
import typer.main

from apportion import __version__
from apportion.errors import ApportionError, InvalidInput
from apportion.studies.cli import artifacts, beginning, looking, running, upkeep
from apportion.studies.cli.failures import INTERRUPTED, fail, reader_left, refuse
from apportion.studies.cli.session import Session
from apportion.studies.home import Home

app = typer.Typer(
    name="apportion",
    help="Find, layer by layer, how far a model can be compressed for the device in front of you.",
    rich_markup_mode=None,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
# not done by decorators: the commands' files must not import this one
for command in (
    *(beginning.init, beginning.sites, beginning.check),
    *(running.submit, running.resume, running.stop),
    *(looking.status, looking.list_, looking.show),
    *(artifacts.export, artifacts.verify),
    *(upkeep.delete, upkeep.gc),
):
    app.command(command.__name__.rstrip("_"))(command)
app.add_typer(upkeep.bank)
app.add_typer(upkeep.db)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"apportion {__version__}")
        raise typer.Exit()


@app.callback(invoke_without_command=True)
def choose(
    context: typer.Context,
    home: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER", help="Folder of the studies. [$APPORTION_HOME, else your data folder]"
        ),
    ] = None,
    database: Annotated[
        str | None, typer.Option(metavar="URL", help="Database, if not in the home folder.")
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and logs.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show it.")
    ] = False,
) -> None:
    """Take the options that come before the command."""
    session = context.ensure_object(Session)
    session.home = Home.find(home, database)
    session.debug = debug
    if context.invoked_subcommand is None:
        print(context.get_help())


def run(arguments: Sequence[str], session: Session) -> int:
    """Run one command line. Returns the exit status; unexpected errors are raised."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # a terminal that lacks a sign shows "?", it does not end a study
        sys.stdout.reconfigure(errors="replace")
    command = typer.main.get_command(app)
    try:
        with command.make_context("apportion", list(arguments), obj=session) as context:
            command.invoke(context)
        sys.stdout.flush()
    except typer.Exit as exit_:
        return exit_.exit_code
    except typer.TyperException as error:
        return refuse(f"apportion: {error.format_message()}")
    except InvalidInput as error:
        return refuse(str(error))
    except ApportionError as error:
        return fail(session, error)
    except BrokenPipeError:
        return reader_left()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    return 0
