"""Which implementation runs each option, and what it costs before the whole model is asked."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from apportion.cost_models.measured import ItemTimes
from apportion.cost_models.operators import ORIGINAL, Program, runs_dense
from apportion.cost_models.sampling import Config, Shape
from apportion.cost_models.table import Rows, padded
from apportion.spaces.padding import served_by
from apportion.spaces.parts import kept_share
from apportion.spaces.space import Space

STRUCTURE, PACKED_CACHE = "structure", "packed cache"


@dataclass(frozen=True)
class Choice:
    """Implementation names [site][option]; "dense" for a weight site's neutral option.

    Attributes:
        names: "structure" for keep, drops, fewer experts and alternatives of choice blocks, "packed
            cache" for what is packed of keys and values; "dense" also where nothing serves.
        credited: whether the option runs anything but the dense computation.
    """

    names: tuple[tuple[str, ...], ...]
    credited: tuple[tuple[bool, ...], ...]

    @property
    def classes(self) -> list[str]:
        """What runs, sorted: the classes that are corrected by one factor each."""
        return sorted({served_by(name) for row in self.names for name in row})


def shape_of(space: Space) -> Shape:
    """The space as arrays."""
    width = max(map(len, space.texts), default=0)
    drops = np.zeros((len(space.sites), width), dtype=bool)
    for place, row in enumerate(space.voiding):
        drops[place, : len(row)] = row
    count = np.array([len(texts) for texts in space.texts], dtype=np.int64)
    return Shape(count, np.array(space.parent, dtype=np.int64), drops)


def choose(space: Space, items: Sequence[ItemTimes], dtype: str) -> Choice:
    """For each option that launches anything, the implementation of least time over the request.

    Where none was measured the option runs dense, and is not credited; nor is it where running
    dense is the fastest.
    """
    names: list[tuple[str, ...]] = []
    credited: list[tuple[bool, ...]] = []
    for place, site in enumerate(space.sites):
        options = space.options[place]
        if site.cache is not None:
            names.append((STRUCTURE, *[PACKED_CACHE] * (len(options) - 1)))
            credited.append((True,) * len(options))
            continue
        if site.is_structure:
            left = experts_left(space, place)
            launching = [o.narrows and number not in left for number, o in enumerate(options)]
            names.append(
                tuple(
                    _fastest(items, place, number) or ORIGINAL if launches else STRUCTURE
                    for number, launches in enumerate(launching)
                )
            )
            credited.append(tuple(option not in left for option in range(len(options))))
            continue
        dense = runs_dense(site, dtype)
        chosen = [_fastest(items, place, o) or ORIGINAL for o in range(1, len(options))]
        names.append((ORIGINAL, *chosen))
        credited.append((True, *(name not in (dense, ORIGINAL) for name in chosen)))
    return Choice(tuple(names), tuple(credited))


def _fastest(items: Sequence[ItemTimes], place: int, option: int) -> str | None:
    """The implementation of least total; the first in the registry's order among equals."""
    totals: dict[str, float] = {}
    for times in items:
        for program in times.plan.candidates.get((place, option), []):
            name = program[0].implementation
            spent = times.plan.item.count * program_times(times, program)[0]
            totals[name] = totals.get(name, 0.0) + spent
    return min(totals, key=lambda name: totals[name], default=None)


def program_times(times: ItemTimes, program: Program) -> tuple[float, float]:
    """Mean and upper milliseconds of all that a program launches."""
    measured = [times.operators[operator.key] for operator in program]
    return sum(mean for mean, _ in measured), sum(upper for _, upper in measured)


def chosen_program(times: ItemTimes, choice: Choice, place: int, option: int) -> Program | None:
    """What an option launches; None for the model's own layers."""
    programs = times.plan.candidates.get((place, option), [])
    name = choice.names[place][option]
    return next((each for each in programs if each[0].implementation == name), None)


def item_rows(space: Space, times: ItemTimes, choice: Choice) -> tuple[Rows, Rows]:
    """Mean and upper milliseconds [sites, options] of one request item, its count not applied.

    The neutral row of a structure site is what dropping it saves less what its sites take, that
    of `drop:mean` what adding its constant takes, that of a treatment what its program takes and
    the kept share of what is in the sub-block beside its layers; one that leaves experts out takes
    what all of it takes. A layer of a listed expert takes its time in the steps that run it. Those
    of a choice block are what its alternatives take more than the fastest of them, those of a cache
    what packing takes more than `keep`.
    """
    rows: list[list[tuple[float, float]]] = [
        [(0.0, 0.0)] * len(options) for options in space.options
    ]
    below = np.zeros(len(space.sites))
    for place in reversed(range(len(space.sites))):
        if space.sites[place].choices:
            rows[place] = _alternative_times(times, place, len(space.options[place]))
        elif space.sites[place].is_structure:
            own = max(0.0, times.savings.get(place, 0.0) - below[place])
            rows[place] = _structure_times(space, times, choice, place, own)
            for number in experts_left(space, place):
                rows[place][number] = (own + below[place], own + below[place])
        elif place in times.plan.originals:
            rows[place] = [
                _operator_times(times, choice, place, option)
                for option in range(len(space.options[place]))
            ]
        if space.parent[place] >= 0:
            below[space.parent[place]] += below[place] + rows[place][0][0]
    means = [[mean for mean, _ in row] for row in rows]
    return padded(means), padded([[upper for _, upper in row] for row in rows])


def experts_left(space: Space, place: int) -> list[int]:
    """The treatments of a site that leave experts out: no time is known to be saved.

    A token is given to as many as before, so the work is the same; with fewer experts each has more
    tokens at a time.
    """
    if not space.sites[place].has_experts:
        return []
    return [number for number, option in enumerate(space.options[place]) if option.narrows]


def _alternative_times(times: ItemTimes, place: int, options: int) -> list[tuple[float, float]]:
    added = [times.added.get((place, option), 0.0) for option in range(options)]
    return [(own - min(added), own - min(added)) for own in added]


def _operator_times(
    times: ItemTimes, choice: Choice, place: int, option: int
) -> tuple[float, float]:
    program = chosen_program(times, choice, place, option) or times.plan.originals[place]
    mean, upper = program_times(times, program)
    often = times.plan.active.get(place, 1.0)
    return mean * often, upper * often


def _structure_times(
    space: Space, times: ItemTimes, choice: Choice, place: int, own: float
) -> list[tuple[float, float]]:
    """Of `keep`, with `own` milliseconds beside what lies below, of drops and of treatments."""
    options = space.options[place]
    sums = (times.added.get((place, number), 0.0) for number in range(1, len(options)))
    rows = [(own, own), *((taken, taken) for taken in sums)]
    beside = _beside(space, times, choice, place)
    for number in range(len(options)):
        program = chosen_program(times, choice, place, number)
        if program is not None:
            mean, upper = program_times(times, program)
            rows[number] = (mean + beside[number], upper + beside[number])
    return rows


def _beside(space: Space, times: ItemTimes, choice: Choice, place: int) -> list[float]:
    """What is left beside its layers of a sub-block under each of its options; 0 but of treatments.

    It is the sub-block's own work, whatever runs the layers, and is corrected as such.
    """
    site, options = space.sites[place], space.options[place]
    layers = program_times(times, times.plan.originals.get(place, ()))[0]
    beside = max(0.0, times.savings.get(place, 0.0) - layers)
    treats = [chosen_program(times, choice, place, o) is not None for o in range(len(options))]
    return [beside * kept_share(site, o) * treats[n] for n, o in enumerate(options)]


def beside_rows(space: Space, times: ItemTimes, choice: Choice) -> Rows:
    """The part of `item_rows` [sites, options] that is a treated sub-block's own work."""
    found = np.zeros((len(space.sites), max(map(len, space.options), default=0)))
    for place, site in enumerate(space.sites):
        if site.is_structure:
            found[place, : len(space.options[place])] = _beside(space, times, choice, place)
    return found


def class_numbers(choice: Choice) -> NDArray[np.int64]:
    """[sites, options]: each option's place in `choice.classes`; 0 where a site has fewer."""
    classes = choice.classes
    width = max(map(len, choice.names), default=0)
    numbers = np.zeros((len(choice.names), width), dtype=np.int64)
    for place, row in enumerate(choice.names):
        numbers[place, : len(row)] = [classes.index(served_by(name)) for name in row]
    return numbers


def alike_options(choice: Choice, rows: Rows) -> NDArray[np.int64]:
    """[sites, options]: the first option of the site with the same implementation and time."""
    alike = np.tile(np.arange(rows.shape[1], dtype=np.int64), (len(rows), 1))
    for place, names in enumerate(choice.names):
        seen: dict[tuple[str, float], int] = {}
        for option, name in enumerate(names):
            if name == STRUCTURE:
                continue
            alike[place, option] = seen.setdefault((name, float(rows[place, option])), option)
    return alike


@dataclass(frozen=True, eq=False)
class ClassRows:
    """Uncorrected milliseconds of one request item, by the classes that are corrected.

    Attributes:
        rows: [sites, options] as `item_rows` gives them.
        beside: as `beside_rows` gives them: of the class of structure, the rest of the row's own.
        numbers: [sites, options] the class of each option.
        structure: number of the class of structure; 0 where there is none.
        classes: how many there are.
    """

    rows: Rows
    beside: Rows
    numbers: NDArray[np.int64]
    structure: int
    classes: int

    def of(self, config: Config, shape: Shape) -> NDArray[np.float64]:
        """A configuration's milliseconds by class [classes]; void sites take none."""
        there = ~shape.void(config)
        places = np.arange(len(self.rows)), np.array(config, dtype=np.int64)
        beside = self.beside[places][there]
        own, numbers = self.rows[places][there] - beside, self.numbers[places][there]
        taken = np.bincount(numbers, weights=own, minlength=self.classes).astype(np.float64)
        taken[self.structure] += beside.sum()
        return taken

    def corrected(self, rows: Rows, factor: NDArray[np.float64]) -> Rows:
        """Rows like `rows`, each part times the factor [classes] of its class."""
        own = factor[self.numbers] * (rows - self.beside)
        return np.asarray(own + factor[self.structure] * self.beside)


def class_rows(space: Space, times: ItemTimes, choice: Choice, rows: Rows) -> ClassRows:
    """Mean rows [sites, options] of a request item with their classes."""
    classes = choice.classes
    structure = classes.index(STRUCTURE) if STRUCTURE in classes else 0
    numbers, beside = class_numbers(choice), beside_rows(space, times, choice)
    return ClassRows(rows, beside, numbers, structure, len(classes))
