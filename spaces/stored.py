"""What a site's weights are under an option, packed."""

from collections.abc import Callable
from dataclasses import dataclass

from apportion.kernels.formats import StoredWeight
from apportion.spaces.grammar import Option
from apportion.spaces.sites import Site


@dataclass(frozen=True)
class StoredSite:
    """The packed weights of a site under an option.

    Attributes:
        weights: of a weight site one for each member; of a treatment one for each cut of its width.
        kept: of a treatment the numbers of the units that stay, ascending; None of any other.
    """

    weights: tuple[StoredWeight, ...]
    kept: tuple[int, ...] | None = None


Stored = Callable[[Site, Option], StoredSite]
"""Gives a site's packed weights under an option."""
