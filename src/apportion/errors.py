"""The one error root. What the user can mend is `InvalidInput`; everything else is ours."""


class ApportionError(Exception):
    """Root of all errors that this package raises on purpose; the command line exits with 1."""

    exit_code = 1


class InvalidInput(ApportionError, ValueError):
    """Something the user gave is wrong. The message is one line: where, what, what would be right.

    The command line prints it without a traceback and exits with 2.
    """

    exit_code = 2
