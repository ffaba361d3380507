"""Realized options of sites, ready to be put into the model, within a bound of bytes."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from apportion.errors import ApportionError
from apportion.kernels.reference import ReferenceLayer, reference_weight
from apportion.spaces.bank import Bank
from apportion.spaces.sites import Site

Index = Mapping[str, Mapping[str, str]]


class RealizedStore:
    """Reference layers of (site, option), the least recently used ones given up first."""

    def __init__(self, bank: Bank, index: Index, budget_bytes: int) -> None:
        """Takes the bank and, for each site and option text, the key of its entry."""
        self.bank = bank
        self.index = index
        self.budget_bytes = budget_bytes
        self.used_bytes = 0
        self._layers: OrderedDict[tuple[str, str], list[nn.Module]] = OrderedDict()

    def get(self, site: Site, option: str, biases: Sequence[Tensor | None]) -> list[nn.Module]:
        """One layer for each member.

        Raises:
            ApportionError: the bank does not hold the option.
        """
        key = (site.name, option)
        if key not in self._layers:
            self._layers[key] = self._realize(site, option, biases)
            self.used_bytes += _bytes(self._layers[key])
        self._layers.move_to_end(key)
        while self.used_bytes > self.budget_bytes and len(self._layers) > 1:
            _, oldest = self._layers.popitem(last=False)
            self.used_bytes -= _bytes(oldest)
        return self._layers[key]

    def _realize(self, site: Site, option: str, biases: Sequence[Tensor | None]) -> list[nn.Module]:
        try:
            entry = self.index[site.name][option]
        except KeyError as error:
            raise ApportionError(f"the bank holds no {option} of site {site.name}") from error
        return [
            ReferenceLayer(reference_weight(stored), bias, stored.format, stored.shape).eval()
            for stored, bias in zip(self.bank.get(entry), biases, strict=True)
        ]


def _bytes(layers: Sequence[nn.Module]) -> int:
    return sum(buffer.nbytes for layer in layers for buffer in layer.buffers())
