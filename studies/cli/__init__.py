"""The command line. Nothing heavy is imported before a command needs it."""

import sys
from functools import partial


def main() -> None:
    """Run `apportion` with the arguments of this process, and exit."""
    from apportion.studies.cli.app import run
    from apportion.studies.cli.failures import unexpected
    from apportion.studies.cli.session import Session

    session = Session()
    sys.excepthook = partial(unexpected, session)
    sys.exit(run(sys.argv[1:], session))
