"""What the experts of a list run: how often any, and on how many tokens then.

An expert that is a module of its own runs only in steps that send it a token, and then on few of
them; which, a single run of a request tells by accident, and of one token it tells of two experts
in eight. So each is sent its share of the tokens in the study's data: with share p of T tokens it
is active in 1 - (1 - p)^T of the steps, and is given T p / (1 - (1 - p)^T) tokens in those, as if
tokens chose independently.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace

from torch import nn

from apportion.cost_models.operators import Given

Lists = Mapping[str, str]
"""Path of a module in a list of like ones -> path of the module that holds the list."""
Shares = Mapping[str, float]
"""Path of an expert -> share of the tokens that it is given."""


def like_modules(model: nn.Module) -> Lists:
    """All that may be experts: modules with weights, in lists of modules of one class."""
    found: dict[str, str] = {}
    for path, items in model.named_modules():
        if isinstance(items, nn.ModuleList) and len({type(item) for item in items}) == 1:
            if next(items.parameters(), None) is not None:
                owner = path.rpartition(".")[0]
                found |= {f"{path}.{number}": owner for number in range(len(items))}
    return found


def expert_shares(lists: Lists, given: Mapping[str, Given]) -> Shares:
    """Shares in one run on the study's data, of lists that are given fewer tokens than their owner.

    One token more is counted that all experts share evenly: none is free because it was not seen.

    Args:
        lists: of the model.
        given: path -> what these modules and their owners were given; what was not run is left out.
    """
    shares: dict[str, float] = {}
    for of in dict.fromkeys(map(_list, lists)):
        items = [path for path in lists if _list(path) == of]
        owner = given.get(lists[items[0]])
        seen = [given[path] for path in items if path in given]
        if owner is None or any(each.shape[-1:] != owner.shape[-1:] for each in seen):
            continue
        tokens = _rows(owner)
        rows = {path: _rows(given[path]) if path in given else 0 for path in items}
        if any(0 < count < tokens for count in rows.values()):
            even = sum(rows.values()) / tokens / len(items)
            shares |= {p: min(1.0, (count + even) / (tokens + 1)) for p, count in rows.items()}
    return shares


def expected_loads(
    lists: Lists, shares: Shares, given: Mapping[str, Given], layers: Iterable[str]
) -> tuple[dict[str, Given], dict[str, float]]:
    """What layers are given in a step that runs them, and the share of steps that do.

    Args:
        lists: of the model.
        shares: of the tokens.
        given: path -> what layers, experts and owners were given in one run of a request.
        layers: paths of the layers asked about.

    Returns:
        `given` with expected tokens for layers of experts, to a power of two, also of those that
        this run left out; path of each such layer -> share of steps.
    """
    found, active = dict(given), dict[str, float]()
    for layer in layers:
        path = next((p for p in shares if f"{layer}.".startswith(f"{p}.")), None)
        like = None if path is None else _like(layer, path, given, lists)
        if path is None or like is None or lists[path] not in given:
            continue
        tokens = _rows(given[lists[path]])
        often = 1 - (1 - shares[path]) ** tokens
        rows = 2 ** round(math.log2(max(1.0, tokens * shares[path] / often)))
        ones = (1,) * (len(like.shape) - 2)
        found[layer] = replace(like, shape=(*ones, rows, like.shape[-1]))
        active[layer] = often
    return found, active


def _like(layer: str, expert: str, given: Mapping[str, Given], lists: Lists) -> Given | None:
    """What a layer was given, or else the layer in its place in another expert of the list."""
    below = layer.removeprefix(expert)
    others = (f"{path}{below}" for path in lists if _list(path) == _list(expert))
    return next((given[path] for path in (layer, *others) if path in given), None)


def _list(expert: str) -> str:
    return expert.rpartition(".")[0]


def _rows(given: Given) -> int:
    return math.prod(given.shape[:-1])
