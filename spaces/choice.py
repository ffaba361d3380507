"""Choice blocks: a place in a user's module where one of several modules runs."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from apportion.errors import InvalidInput
from apportion.spaces.layers import owners_of

OPERATION = "op:"
NAME = re.compile(r"[A-Za-z0-9_-]+")


class Choice(nn.Module):
    """Runs one of its alternatives; the study says which.

    The first one is what the dense model runs. All take and return the same shapes. Which one is
    active is no part of the module's state (`state_dict`).
    """

    def __init__(self, alternatives: Mapping[str, nn.Module]) -> None:
        """Takes the alternatives by name, in the order of the options `op:NAME`.

        Raises:
            InvalidInput: fewer than two, or a name that an option cannot spell.
        """
        super().__init__()
        if len(alternatives) < 2:
            raise InvalidInput(f"a Choice has at least 2 alternatives, not {len(alternatives)}")
        for name in alternatives:
            if not NAME.fullmatch(name) or hasattr(nn.ModuleDict(), name):
                raise InvalidInput(
                    f'a Choice cannot name an alternative "{name}": a name has letters, digits, '
                    "_ and -, and is no attribute of nn.ModuleDict"
                )
        self.alternatives = nn.ModuleDict(alternatives)
        self.active = next(iter(alternatives))

    @property
    def names(self) -> tuple[str, ...]:
        """The alternatives, the first one first."""
        return tuple(self.alternatives)

    def forward(self, *args: Any, **keywords: Any) -> Any:
        """What the active alternative returns."""
        return self.alternatives[self.active](*args, **keywords)

    def select(self, name: str) -> None:
        """Make an alternative the active one. Raises KeyError on an unknown name."""
        if name not in self.alternatives:
            raise KeyError(f"no alternative {name}; there are {', '.join(self.names)}")
        self.active = name

    def settle(self, name: str) -> None:
        """Select an alternative and forget all others. Raises KeyError on an unknown name."""
        self.select(name)
        for other in set(self.names) - {name}:
            del self.alternatives[other]


def choice_at(model: nn.Module, path: str) -> Choice:
    """The choice block at a path. Raises TypeError where there is none."""
    module = model.get_submodule(path)
    if not isinstance(module, Choice):
        raise TypeError(f"{path} is no choice block")
    return module


def alternative_path(site: str, name: str) -> str:
    """Path of an alternative, from the path of its choice block."""
    return f"{site}.alternatives.{name}"


def unchosen(site: str, names: Sequence[str], option: str) -> tuple[str, ...]:
    """Prefixes of all that an option `op:NAME` of a choice block leaves out.

    Args:
        site: path of the choice block.
        names: its alternatives.
        option: the option's text.
    """
    chosen = option.removeprefix(OPERATION)
    return tuple(alternative_path(site, name) + "." for name in names if name != chosen)


def find_choices(model: nn.Module, untreated: dict[str, str]) -> Iterator[tuple[str, Choice]]:
    """Path and module of each choice block that can be a site; of all others the reason."""
    owners = owners_of(model)
    outer: list[str] = []
    for path, module in model.named_modules():
        if not isinstance(module, Choice):
            continue
        around = next((name for name in outer if path.startswith(name + ".")), None)
        outer.append(path)
        if around is not None:
            untreated[path] = f"it lies in the choice block {around}"
        elif not path:
            untreated[path] = "the whole model is a choice block; put it into a module"
        elif any(owners[id(parameter)] > 1 for parameter in module.parameters()):
            untreated[path] = "an alternative shares a weight with another layer"
        else:
            yield path, module
