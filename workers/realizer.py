"""Entries of the bank as work: a site under the options that the bank lacks of it.

Entries depend on nothing but what names them, so any worker may make any; a site's options are one
work, because they share what is computed of its statistics. Each entry is in the bank as soon as it
is made: a worker that is lost takes no finished one with it.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from apportion.errors import InvalidInput
from apportion.spaces.compressors.compose import forget_factorizations
from apportion.spaces.grammar import Option, parse_option
from apportion.spaces.realization import realize_options
from apportion.spaces.statistics import GATES, StatisticsFiles
from apportion.workers.spec import (
    Origin,
    Setting,
    WorkerSpec,
    cache_folder,
    open_bank,
    origin_of,
)

FACTORIZED = ("sparsegpt", "gptq")


@dataclass(frozen=True)
class Realize:
    """The work: entries of one site.

    Attributes:
        site: its name.
        keys: option text -> key of the entry that is wanted.
        statistics: the site's file of statistics, as the driver's machine names it.
        gates: likewise the file with the scores of its gates; None: no option needs them.
    """

    site: str
    keys: Mapping[str, str]
    statistics: str
    gates: str | None = None

    @property
    def size(self) -> int:
        """Entries."""
        return len(self.keys)

    def failed(self, reason: str, seconds: float, error_class: str) -> "Realization":
        """That they were not made."""
        return Realization(seconds, failure=f"{self.site} is not compressed: {reason}")


@dataclass(frozen=True)
class Realization:
    """What came of it.

    Attributes:
        seconds: wall time.
        failure: why entries are missing, in one line, or None.
        error: what was wrong, where it is the user's to mend.
        origin: where the entries are, if that is another bank than the driver's.
    """

    seconds: float
    failure: str | None = None
    error: InvalidInput | OSError | None = None
    origin: Origin | None = None


class Realizer:
    """One resident dense model whose sites are realized into a bank."""

    def __init__(
        self, setting: Setting, spec: WorkerSpec, stopped: Callable[[], bool] = lambda: False
    ) -> None:
        """Takes a model with its sites, and where its bank is.

        Args:
            setting: opened from `spec`; the model stays dense.
            stopped: whether to begin no entry any more.
        """
        self._model = setting.opened.model
        self._sites = {site.name: site for site in setting.space.sites}
        self._spec = spec
        self._bank = open_bank(spec)
        self._stopped = stopped

    def realize(self, work: Realize) -> Realization:
        """Make what the bank lacks of the entries.

        Raises:
            NotFetched: the statistics do not come to this node.
        """
        began = time.perf_counter()
        try:
            whole = self._fill(work)
        except (InvalidInput, OSError) as error:  # trying once more would not help
            return Realization(time.perf_counter() - began, str(error), error)
        finally:
            forget_factorizations()
        seconds = time.perf_counter() - began
        return Realization(seconds, None if whole else "stopped", origin=origin_of(self._spec))

    def _fill(self, work: Realize) -> bool:
        """Whether all entries are there."""
        names = (work.site, *self._sites[work.site].input_names)
        files = dict.fromkeys(names, self._file(work.statistics))
        if work.gates is not None:
            files[f"{work.site}{GATES}"] = self._file(work.gates)
        statistics = StatisticsFiles(files)
        keys = {parse_option(text): key for text, key in work.keys.items()}
        wanted = sorted((o for o in keys if not self._bank.has(keys[o])), key=_factorization)
        site = self._sites[work.site]
        dtype, multiple = self._spec["dtype"], self._spec["rank_multiple"]
        for _, alike in groupby(wanted, _factorization):
            options = list(alike)
            made = realize_options(self._model, site, options, statistics, dtype, multiple)
            for option in options:
                if self._stopped():
                    return False
                self._bank.put(keys[option], next(made))
        return True

    def _file(self, path: str) -> Path:
        if "origin" not in self._spec:
            return Path(path)
        from apportion.workers.bank_fetching import fetch_file

        return fetch_file(self._spec["origin"]["node"], Path(path), cache_folder(self._spec))


def _factorization(option: Option) -> tuple[tuple[str, ...], bool]:
    """Sorts options by what of the statistics is factorized for them and kept for the next.

    Those without come first, so that nothing is kept beside what they take.
    """
    methods = tuple(method for _, method in option.methods if method in FACTORIZED)
    return methods, option.rank_percent is not None or option.residual_rank is not None
