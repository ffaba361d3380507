"""Home: the folder of the database, the bank, the cache and the logs."""

import os
import shlex
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from apportion.errors import InvalidInput

VARIABLE = "APPORTION_HOME"


@dataclass(frozen=True)
class Home:
    """Where studies live. Nothing is made on disk before `create`.

    Attributes:
        path: absolute folder.
        database_url: given by `--database`; None: `studies.db` in this folder.
        options: the options that led here, repeated in every command that a user is told to type.
    """

    path: Path
    database_url: str | None = None
    options: tuple[str, ...] = ()

    @classmethod
    def find(cls, home: str | Path | None = None, database: str | None = None) -> "Home":
        """`home`, else the variable APPORTION_HOME, else the user's data folder."""
        options: tuple[str, ...] = () if home is None else ("--home", str(home))
        if database is not None:
            from apportion.studies.database.location import without_password

            options += ("--database", without_password(database))
        chosen = home or os.environ.get(VARIABLE) or platformdirs.user_data_path("apportion", False)
        return cls(Path(chosen).expanduser().absolute(), database, options)

    @property
    def database(self) -> str:
        """Address of the database."""
        return self.database_url or f"sqlite:///{self.path / 'studies.db'}"

    @property
    def bank(self) -> Path:
        """Realized options, shared by all studies."""
        return self.path / "bank"

    @property
    def cache(self) -> Path:
        """What can be made again; deletable."""
        return self.path / "cache"

    def spool(self, study: str) -> Path:
        """Results of a study that wait for its database."""
        return self.path / "spool" / study

    def log(self, study: str = "apportion") -> Path:
        """The log file of a study, or of what belongs to none."""
        return self.path / "logs" / f"{study}.log"

    @property
    def shown(self) -> str:
        """The folder as a user would type it: relative where it lies in the working folder."""
        here = Path.cwd()
        inside = self.path.is_relative_to(here) and self.path != here
        return str(self.path.relative_to(here)) if inside else str(self.path)

    def command(self, words: str) -> str:
        """What to type for `words` ("resume demo") so that this home is found again."""
        return " ".join(["apportion", *(shlex.quote(option) for option in self.options), words])

    def create(self) -> "Home":
        """Make the folders. Raises InvalidInput where that is not possible."""
        try:
            for folder in (self.bank, self.cache, self.log().parent):
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._unusable(error.strerror or str(error)) from error
        if not os.access(self.path, os.W_OK | os.X_OK):
            raise self._unusable("it cannot be written to")
        return self

    def _unusable(self, reason: str) -> InvalidInput:
        return InvalidInput(
            f"home {self.path}: {reason}; choose another folder with --home or {VARIABLE}"
        )
