"""What all commands share: where the studies live, and where the log of this run is."""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from apportion.errors import InvalidInput
from apportion.studies.cli.display import ConsoleDisplay
from apportion.studies.cli.output import libraries_into
from apportion.studies.home import Home

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
PLACE = re.compile(r"(study|model|data|objective|space|devices|limits|search)(\[\d+\])?[.:]")


@dataclass
class Session:
    """One run of the command line."""

    home: Home = field(default_factory=Home.find)
    debug: bool = False
    study: str = "apportion"
    """Whose log takes what this run has to say."""

    @property
    def log(self) -> Path:
        """The log file of this run."""
        return self.home.log(self.study)

    @contextmanager
    def working(self, threads: int | None = None) -> Iterator[ConsoleDisplay]:
        """Do heavy work: libraries talk to the log, the display to the terminal.

        Args:
            threads: of the evaluations in this process; to be set before torch is imported.
        """
        if threads is not None:
            os.environ.update(dict.fromkeys(THREAD_VARIABLES, str(threads)))
        self.home.create()
        with libraries_into(None if self.debug else self.log) as terminal:
            yield ConsoleDisplay(terminal)

    def display(self) -> ConsoleDisplay:
        """For commands that only read."""
        return ConsoleDisplay(sys.stdout)


@contextmanager
def naming(study_file: Path) -> Iterator[None]:
    """Put the study file's name before each problem that names a place in it."""
    try:
        yield
    except InvalidInput as error:
        lines = str(error).splitlines()
        named = [f"{study_file}: {line}" if PLACE.match(line) else line for line in lines]
        raise InvalidInput("\n".join(named)) from error
