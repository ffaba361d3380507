"""Sub-networks of a super-net: what stands at each site under an option, and how one is run.

A sub-network is a configuration, site -> option text, as in a study. All share the weights of one
model. Under `op:NAME` an alternative runs, under `drop` nothing does, and under `cP%:first` the
layers of a sub-block take the first rows and columns of the whole weights, so that gradients flow
to these (Yu and others, 2019, "Slimmable Neural Networks"; Cai and others, 2020, "Once-for-All").
What runs is what a study evaluates and exports for the same configuration.
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from apportion.spaces.apply import Dropped, chosen_alternatives
from apportion.spaces.batches import Batch, call
from apportion.spaces.choice import OPERATION, choice_at
from apportion.spaces.grammar import Option
from apportion.spaces.kernel_sizes import plain_parameters
from apportion.spaces.narrowing import narrowed_copy, put_vectors, unit_vectors, unit_weights
from apportion.spaces.parts import first_units
from apportion.spaces.sites import Site, Width
from apportion.spaces.space import KEEP, Configuration, Space
from apportion.spaces.views import set_parameter


class Supernet:
    """A model that runs any configuration of a space of choice blocks and structure sites.

    Attributes:
        model: the dense model; between two runs it is as it was, but for the alternatives.
        space: options `op:NAME`, `keep`, `drop` and `cP%:first`.
        choices: path of each choice block of the space -> the block.
    """

    def __init__(self, model: nn.Module, space: Space) -> None:
        """Takes a model and a space over it."""
        self.model, self.space = model, space
        self.choices = {s.name: choice_at(model, s.name) for s in space.sites if s.choices}
        self._stand_ins = {
            (site.name, str(option)): _stand_in(model, site, option)
            for site, options in zip(space.sites, space.options, strict=True)
            for option in options
            if not site.choices and str(option) != KEEP
        }

    def run(self, configuration: Mapping[str, str], inputs: Batch) -> Any:
        """What a sub-network gives for a batch; gradients flow to the model's own weights."""
        for path, name in chosen_alternatives(self.space, configuration).items():
            self.choices[path].select(name)
        chosen = self.space.canonical(configuration).items()
        standing = {key[0]: self._stand_ins[key] for key in chosen if key in self._stand_ins}
        weights: dict[str, Tensor] = {}
        for stand_in in standing.values():
            weights |= stand_in.weights(self.model)
        whole = {path: self.model.get_submodule(path) for path in standing}
        try:
            for path, stand_in in standing.items():
                self.model.set_submodule(path, stand_in.module.train(self.model.training))
            return call(lambda *args, **kw: functional_call(self.model, weights, args, kw), inputs)
        finally:
            for path, module in whole.items():
                self.model.set_submodule(path, module)

    def size(self, site: Site, text: str) -> int:
        """The number of parameters that are there at a site under an option."""
        if site.choices:
            name = text.removeprefix(OPERATION)
            return plain_parameters(self.choices[site.name].alternatives[name])
        if text == KEEP:
            module = self.model.get_submodule(site.name)
        else:
            module = self._stand_ins[site.name, text].module
        return sum(parameter.numel() for parameter in module.parameters())


def extremes(supernet: Supernet) -> tuple[Configuration, Configuration]:
    """The largest and the smallest sub-network.

    At each site, the option of most and that of fewest parameters; of equals the first.
    """
    space = supernet.space
    largest: Configuration = {}
    smallest: Configuration = {}
    for site, texts in zip(space.sites, space.texts, strict=True):
        sizes = {text: supernet.size(site, text) for text in texts}
        largest[site.name] = max(sizes, key=sizes.__getitem__)
        smallest[site.name] = min(sizes, key=sizes.__getitem__)
    return largest, smallest


def drawn(space: Space, count: int, generator: random.Random) -> list[Configuration]:
    """As many random sub-networks; at each site no option comes twice before all came once.

    So Chu and others (2019, "FairNAS") draw. What is drawn for a site under a dropped one is void.
    """
    rows = {
        site.name: generator.sample(texts, len(texts))
        for site, texts in zip(space.sites, space.texts, strict=True)
    }
    return [{name: row[n % len(row)] for name, row in rows.items()} for n in range(count)]


@dataclass(frozen=True)
class _StandIn:
    """What stands in the place of a structure site.

    Attributes:
        module: what runs there; a narrower one holds no weights of its own.
        width: of a narrower one, that of the site.
        kept: the units that it has.
    """

    module: nn.Module
    width: Width | None = None
    kept: tuple[int, ...] = ()

    def weights(self, model: nn.Module) -> dict[str, Tensor]:
        """Name in the model's state -> what a narrower one takes of the whole weights."""
        if self.width is None:
            return {}
        vectors = unit_vectors(model, self.width, self.kept)
        return unit_weights(model, self.width, self.kept) | vectors


def _stand_in(model: nn.Module, site: Site, option: Option) -> _StandIn:
    kept = first_units(site, option)
    if kept is None or site.width is None:
        return _StandIn(Dropped(site, model.get_submodule(site.name)))
    # On the meta device: whatever would run without the whole model's weights fails, and is told.
    narrow = narrowed_copy(model, site, kept)
    below = f"{site.name}."
    for path, weight in unit_weights(model, site.width, kept).items():
        set_parameter(narrow, path.removeprefix(below), weight.detach().to("meta"))
    vectors = unit_vectors(model, site.width, kept)
    put_vectors(narrow, {p.removeprefix(below): v.detach().to("meta") for p, v in vectors.items()})
    return _StandIn(narrow, site.width, kept)
