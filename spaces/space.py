"""Spaces: the ordered sites, the ordered options of each, and configurations of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cached_property

from apportion.errors import InvalidInput
from apportion.spaces.grammar import Option, parse_option
from apportion.spaces.sites import Site, group_name

Config = tuple[int, ...]
Configuration = dict[str, str]

DENSE, KEEP, DROP, DROP_MEAN = "dense", "keep", "drop", "drop:mean"


@dataclass(frozen=True)
class Space:
    """The sites that have a choice, in tree order, and their options.

    `options[i][0]` is always the neutral one: `dense` of a weight site, `keep` of a structure site,
    the first alternative of a choice block. `drop` comes next, where a site has it.
    """

    sites: tuple[Site, ...]
    options: tuple[tuple[Option, ...], ...]

    @cached_property
    def names(self) -> dict[str, int]:
        """Site name -> place."""
        return {site.name: place for place, site in enumerate(self.sites)}

    @cached_property
    def texts(self) -> tuple[tuple[str, ...], ...]:
        """The options of each site as text."""
        return tuple(tuple(str(option) for option in row) for row in self.options)

    @cached_property
    def parent(self) -> tuple[int, ...]:
        """Place of the innermost structure site of this space around each site; -1: none."""
        return tuple(self._parent(site) for site in self.sites)

    def _parent(self, site: Site) -> int:
        owner = site.name if site.is_structure else site.members[0].path
        around = [
            place
            for place, other in enumerate(self.sites)
            if other.is_structure and owner.startswith(other.name + ".")
        ]
        return max(around, key=lambda place: len(self.sites[place].name), default=-1)

    def index(self, name: str) -> int:
        """Place of a site. Raises InvalidInput with the nearest name."""
        if name not in self.names:
            near = get_close_matches(name, self.names, n=1)
            hint = f'; did you mean "{near[0]}"?' if near else ""
            raise InvalidInput(f'no site "{name}" in this space{hint}')
        return self.names[name]

    def config(self, configuration: Mapping[str, str]) -> Config:
        """Indices of a configuration on paper; sites that it leaves out stay neutral.

        Raises:
            InvalidInput: an unknown site, or an option that the site does not have.
        """
        places = [0] * len(self.sites)
        for name, text in configuration.items():
            site = self.index(name)
            if text not in self.texts[site]:
                known = ", ".join(self.texts[site])
                raise InvalidInput(f'site {name} has no option "{text}"; it has {known}')
            places[site] = self.texts[site].index(text)
        return tuple(places)

    def configuration(self, config: Sequence[int]) -> Configuration:
        """Site name -> option text, canonical: void sites are neutral."""
        void = self.voids(config)
        rows = zip(self.names, self.texts, config, void, strict=True)
        return {name: texts[0 if gone else option] for name, texts, option, gone in rows}

    def canonical(self, configuration: Mapping[str, str]) -> Configuration:
        """The configuration with every void site made neutral."""
        return self.configuration(self.config(configuration))

    @cached_property
    def voiding(self) -> tuple[tuple[bool, ...], ...]:
        """[site][option] whether it voids all sites below: drops, and treatments of all of them."""
        return tuple(tuple(each.drops or each.narrows for each in row) for row in self.options)

    def voids(self, config: Sequence[int]) -> list[bool]:
        """Of each site whether it is void."""
        if not any(self.voiding[place][config[place]] for place in self._structures):
            return [False] * len(self.sites)
        return [self.void(config, place) for place in range(len(self.sites))]

    @cached_property
    def _structures(self) -> tuple[int, ...]:
        return tuple(place for place, site in enumerate(self.sites) if site.is_structure)

    def void(self, config: Sequence[int], place: int) -> bool:
        """Whether a site lies under one that is dropped, or treated as a whole."""
        above = self.parent[place]
        while above >= 0:
            if self.voiding[above][config[above]]:
                return True
            above = self.parent[above]
        return False

    @cached_property
    def uniform_texts(self) -> tuple[str, ...]:
        """What can be chosen everywhere: all options but dense, keep, drops and alternatives.

        What is chosen for caches leaves weights alone, and the other way round.
        """
        found = dict.fromkeys(
            str(option)
            for row in self.options
            for option in row
            if option.narrows
            or option.cache_bits
            or not (option.is_structure or str(option) == DENSE)
        )
        return tuple(found)

    @property
    def weight_sites(self) -> list[int]:
        """Places of the sites that hold weights."""
        return [place for place, site in enumerate(self.sites) if not site.is_structure]

    @cached_property
    def input_sites(self) -> tuple[Site, ...]:
        """Its weight sites, and what stands for those that only a treatment reaches.

        Their inputs are what calibration watches.
        """
        found = {site.members[0].path: site for site in self.sites if site.members}
        for site, options in zip(self.sites, self.options, strict=True):
            if not any(option.narrows for option in options):
                continue
            if site.has_experts:
                why = "what is seen of experts is what their router sends them"
                stands = replace(site, kind="experts", members=site.groups[0], unseen=why)
                found[site.name] = stands
            else:
                for members in site.groups:
                    kind = "linear" if members[0].shape.conv is None else "conv"
                    stands = Site(group_name(members), kind, members, site.name)
                    found.setdefault(members[0].path, stands)
        return tuple(found.values())

    @cached_property
    def mean_sites(self) -> tuple[Site, ...]:
        """Its structure sites that can be dropped for the mean of what they add."""
        pairs = zip(self.sites, self.texts, strict=True)
        return tuple(site for site, texts in pairs if DROP_MEAN in texts)

    @cached_property
    def gated_sites(self) -> tuple[Site, ...]:
        """Its structure sites of which an option needs the scores of gates."""
        pairs = zip(self.sites, self.options, strict=True)
        return tuple(site for site, row in pairs if any(option.needs_gates for option in row))

    def without(self, struck: Mapping[str, Sequence[str]]) -> "Space":
        """The space less the struck options; neutral ones cannot be struck."""
        options = tuple(
            tuple(
                option
                for place, option in enumerate(row)
                if place == 0 or str(option) not in struck.get(site.name, ())
            )
            for site, row in zip(self.sites, self.options, strict=True)
        )
        return Space(self.sites, options)

    def uniform(self, text: str, stored_bytes: Sequence[Mapping[str, int]]) -> Config:
        """`text` at every weight site that has it, the next dearer option elsewhere.

        An option of caches is put on every cache that has it; weights stay dense then.

        A treatment, `cP%`, `vP%` or `qP%`, is put on every sub-block that has it; where none is,
        weight sites get what it does to narrowed weights, or the next dearer option.

        Args:
            text: an option of weight sites, of caches, or a treatment.
            stored_bytes: for each site, option text -> bytes of the site stored so.

        Raises:
            InvalidInput: no site has the option.
        """
        option = parse_option(text)
        config = [0] * len(self.sites)
        if option.cache_bits and text in self.uniform_texts:
            return tuple(row.index(text) if text in row else 0 for row in self.texts)
        if option.narrows:
            treated = [place for place in self._structures if text in self.texts[place]]
            for place in treated:
                config[place] = self.texts[place].index(text)
            text = str(option.rest)
        else:
            treated = []
        open_places = [place for place in self.weight_sites if not self.void(config, place)]
        share = [
            stored_bytes[place][text] / self.sites[place].weights
            for place in open_places
            if text in self.texts[place]
        ]
        if not share and not treated:
            raise InvalidInput(f'no site of this space has the option "{option}"')
        if share:
            bytes_per_weight = sum(share) / len(share)
            for place in open_places:
                config[place] = self._next_dearer(
                    place, text, bytes_per_weight, stored_bytes[place]
                )
        return tuple(config)

    def _next_dearer(
        self, place: int, text: str, bytes_per_weight: float, stored_bytes: Mapping[str, int]
    ) -> int:
        texts = self.texts[place]
        if text in texts:
            return texts.index(text)
        floor = bytes_per_weight * self.sites[place].weights
        dearer = [t for t in texts if stored_bytes[t] >= floor]
        return texts.index(min(dearer, key=lambda t: stored_bytes[t], default=DENSE))
