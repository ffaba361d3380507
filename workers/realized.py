"""Realized options of sites, ready to be put into the model, within a bound of bytes."""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from apportion.errors import ApportionError
from apportion.kernels.reference import reference_layer, reference_weight
from apportion.spaces.apply import Dropped, bias_of, write_back
from apportion.spaces.bank import Bank
from apportion.spaces.grammar import parse_option
from apportion.spaces.narrowing import moved, narrowed_copy
from apportion.spaces.padding import pad_heads
from apportion.spaces.parts import treated_site
from apportion.spaces.sites import Site
from apportion.spaces.stored import StoredSite
from apportion.spaces.views import parameter_at, written

Index = Mapping[str, Mapping[str, str]]


@dataclass(frozen=True)
class Realized:
    """A site under an option: its layers, a treated sub-block, or values by parameter name."""

    layers: list[nn.Module]
    parameters: dict[str, Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        buffers = [buffer for layer in self.layers for buffer in layer.buffers()]
        return sum(tensor.nbytes for tensor in [*buffers, *self.parameters.values()])


class RealizedStore:
    """Realized options of sites, the least recently used ones given up first."""

    def __init__(self, bank: Bank, index: Index, budget_bytes: int) -> None:
        """Takes the bank and, for each site and option text, the key of its entry."""
        self.bank = bank
        self.index = index
        self.budget_bytes = budget_bytes
        self.used_bytes = 0
        self._held: OrderedDict[tuple[str, str], Realized] = OrderedDict()

    def get(self, site: Site, option: str, biases: Sequence[Tensor | None]) -> Realized:
        """One layer for each member, and the vectors of the site's norm where they change.

        Raises:
            ApportionError: the bank does not hold the option.
        """

        def realize() -> Realized:
            stored = self._stored(site, option)
            layers: list[nn.Module] = [
                reference_layer(weight, bias).eval()
                for weight, bias in zip(stored.weights, biases, strict=True)
            ]
            return Realized(layers, stored.vectors(site))

        return self._hold(site, option, realize)

    def parameters(self, site: Site, option: str, dense: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The values of a site's parameters where they are written back.

        Args:
            site: its members are views of the parameters.
            option: what they hold.
            dense: parameter name -> its dense values.

        Raises:
            ApportionError: the bank does not hold the option.
        """

        def realize() -> Realized:
            matrices = [reference_weight(stored) for stored in self._stored(site, option).weights]
            return Realized([], written(dense, site.members, matrices))

        return self._hold(site, option, realize).parameters

    def replacement(self, site: Site, option: str, dense: nn.Module) -> nn.Module:
        """The narrower sub-block of a treatment, or the constant in the place of a dropped one.

        Args:
            site: a structure site.
            option: the treatment, or `drop:mean`.
            dense: a module in which the dense sub-block has the site's path.

        Raises:
            ApportionError: the bank does not hold the option.
        """

        def realize() -> Realized:
            stored = self._stored(site, option)
            if stored.constant is not None:
                replaced = dense.get_submodule(site.name)
                return Realized([Dropped(site, replaced, stored.constant).eval()], {})
            treated, kept = treated_site(site, parse_option(option)), stored.kept or ()
            narrow = narrowed_copy(dense, treated, kept, stored.biases)
            if treated.width is None:
                raise ApportionError(f"{site.name} cannot be narrowed by {option}")
            width = moved(treated.width, site.name, "")
            if site.has_experts:
                own = width.members(len(kept))
                write_back(narrow, own, stored.weights)
                paths = {member.parameter_path for member in own}
                return Realized([narrow], {path: parameter_at(narrow, path) for path in paths})
            for cut, weight in zip(width.cuts, stored.weights, strict=True):
                path = cut.member.module
                layer = reference_layer(weight, bias_of(narrow, path))
                narrow.set_submodule(path, layer.eval())
            pad_heads(narrow, width, kept)
            return Realized([narrow], {})

        return self._hold(site, option, realize).layers[0]

    def _hold(self, site: Site, option: str, realize: Callable[[], Realized]) -> Realized:
        """What is held, or is realized now; the oldest is given up beyond the budget."""
        key = (site.name, option)
        if key not in self._held:
            self._held[key] = realize()
            self.used_bytes += self._held[key].nbytes
        self._held.move_to_end(key)
        while self.used_bytes > self.budget_bytes and len(self._held) > 1:
            _, oldest = self._held.popitem(last=False)
            self.used_bytes -= oldest.nbytes
        return self._held[key]

    def _stored(self, site: Site, option: str) -> StoredSite:
        try:
            entry = self.index[site.name][option]
        except KeyError as error:
            raise ApportionError(f"the bank holds no {option} of site {site.name}") from error
        return self.bank.get(entry)
