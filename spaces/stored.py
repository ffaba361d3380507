"""What is stored of a site under an option, packed."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from apportion.kernels.formats import StoredWeight
from apportion.spaces.grammar import Option
from apportion.spaces.sites import Site


@dataclass(frozen=True)
class StoredSite:
    """The packed weights of a site under an option, or the constant in its place.

    Attributes:
        weights: of a weight site one for each member; of a treatment one for each cut of its width.
        kept: of a treatment the numbers of the units that stay, ascending; None of any other.
        constant: of `drop:mean`, which has no weights, what is added in place of the site, in the
            shape `Site.constant`; None of any other.
        biases: of `vP%` and `qP%` the bias of each cut of its width, None where the layer has none;
            empty of any other, whose biases are the model's own.
        norm: of scales of inputs that are folded into `Site.norm` its vectors; empty of any other,
            whose norm is the model's own.
    """

    weights: tuple[StoredWeight, ...]
    kept: tuple[int, ...] | None = None
    constant: Tensor | None = None
    biases: tuple[Tensor | None, ...] = ()
    norm: tuple[Tensor, ...] = ()

    def vectors(self, site: Site) -> dict[str, Tensor]:
        """What takes the place of vectors of the site's norm, by their names in the model."""
        if site.norm is None or not self.norm:
            return {}
        return dict(zip(site.norm.paths, self.norm, strict=True))


Stored = Callable[[Site, Option], StoredSite]
"""Gives what is stored of a site under an option."""
