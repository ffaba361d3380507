"""Key-value caches as sites: which attention hands its keys and values to one, and packing them.

Nothing here lists models by name. An attention sub-block is run on what it was given with a cache
that writes down what it is handed and gives it back, twice and with a mask that lets each token see
one of both; its output has to stay what it was, and has to change where the cache gives back
something else.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from apportion.errors import InvalidInput
from apportion.kernels.packed_cache import CacheFormat, PackedCache, attended
from apportion.spaces.batches import Batch
from apportion.spaces.entries import Entry
from apportion.spaces.grammar import Option, names_cache
from apportion.spaces.probing import Call, first_tensor, probe
from apportion.spaces.sites import CACHE, Cached, Site
from apportion.spaces.trials import (
    NO_CHANGE,
    TOLERANCE,
    NotRun,
    in_float32,
    is_cache,
    runner,
)

MASK = "attention_mask"
"""The keyword of a mask in every attention of transformers."""


@dataclass(frozen=True)
class Caches:
    """What attention sub-blocks hand to a cache.

    Attributes:
        sites: name of an attention sub-block -> the site of its cache.
        refused: name of one that has none -> the reason.
    """

    sites: dict[str, Site]
    refused: dict[str, str]

    def among(self, sites: Sequence[Site]) -> tuple[Site, ...]:
        """All sites, each cache behind its attention."""
        found: list[Site] = []
        for site in sites:
            found += [site, self.sites[site.name]] if site.name in self.sites else [site]
        return tuple(found)


def find_caches(model: nn.Module, batch: Batch, sites: Sequence[Site]) -> Caches:
    """The caches of a model's attention sub-blocks.

    Args:
        model: the dense model.
        batch: what it is run on.
        sites: those that discovery found.

    Raises:
        Exception: whatever the model itself raises on the batch.
    """
    with _using_cache(model):
        calls = probe(model, batch).calls
    caches = Caches({}, {})
    for site in sites:
        if site.kind != "attention":
            continue
        found = _cached(model.get_submodule(site.name), calls[site.name])
        if isinstance(found, str):
            caches.refused[site.name] = found
        else:
            name = f"{site.name}.{CACHE}"
            caches.sites[site.name] = Site(name, CACHE, parent=site.name, cache=found)
    return caches


def named_caches(
    model: nn.Module, batch: Batch, sites: Sequence[Site], entries: Sequence[Entry]
) -> Caches | None:
    """The caches of a model, where a study file has options for some; None: it has not.

    Raises:
        InvalidInput: there is none to take them.
        Exception: whatever the model itself raises on the batch.
    """
    asking = [
        (number, entry)
        for number, entry in enumerate(entries, 1)
        if any(map(names_cache, entry.options))
    ]
    if not asking:
        return None
    found = find_caches(model, batch, sites)
    needed = [number for number, entry in asking if not entry.skip_unfit]
    if not found.sites and needed:
        whys = (f"{name}: {reason}" for name, reason in found.refused.items())
        why = next(whys, "it has no attention sub-block")
        raise InvalidInput(
            f"space[{needed[0]}].options: no cache of this model can be packed; {why}"
        )
    return found


@contextmanager
def _using_cache(model: nn.Module) -> Iterator[None]:
    """A transformers model hands out a cache meanwhile, as it does where it generates."""
    config = getattr(model, "config", None)
    before = getattr(config, "use_cache", None)
    if config is None or before is None:
        yield
        return
    config.use_cache = True
    try:
        yield
    finally:
        config.use_cache = before


@dataclass
class _Recorder:
    """Stands for a cache: writes down what it is handed, and gives a multiple of it back, twice."""

    key_factor: float = 1.0
    value_factor: float = 1.0
    seen: list[tuple[Any, Any, Any]] = field(default_factory=list)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        self.seen.append((key_states, value_states, layer_idx))
        keys, values = key_states * self.key_factor, value_states * self.value_factor
        if keys.shape[2] == 1:
            return keys, values
        return torch.cat([keys, keys], 2), torch.cat([values, values], 2)


@torch.no_grad()
def _cached(module: nn.Module, call: Call) -> Cached | str:
    """What a sub-block hands to a cache, or why it has none that can be packed."""
    given = {name: value for name, value in call.keywords.items() if is_cache(value)}
    if len(given) != 1:
        return "the model gives it no cache by name"
    ((keyword, cache),) = given.items()
    if type(cache).__name__ != "DynamicCache":
        return f"it is given a {type(cache).__name__}, not a DynamicCache"
    try:
        return _tried(in_float32(module), call, keyword)
    except NotRun as failure:
        return f"with a cache of its own it cannot be run ({failure})"
    except (RuntimeError, TypeError) as failure:
        return f"it cannot be copied ({failure})"


def _tried(module: nn.Module, call: Call, keyword: str) -> Cached | str:
    run = runner(call)

    def with_cache(recorder: _Recorder) -> Tensor:
        def forward(*args: Any, **given: Any) -> Any:
            return module(*args, **_masked({**given, keyword: recorder}, args, 0))

        return run(forward)

    recorder = _Recorder()
    dense, cached = run(module), with_cache(recorder)
    found = _shapes(recorder, call, keyword)
    if isinstance(found, str):
        return found
    size = float(dense.norm())
    if float((cached - dense).norm()) > TOLERANCE * size:
        return "with a cache of its own it gives another output"
    for what, other in (("keys", _Recorder(key_factor=0)), ("values", _Recorder(value_factor=0))):
        if float((with_cache(other) - dense).norm()) <= NO_CHANGE * size:
            return f"its output does not depend on the {what} that the cache gives"
    return _unpackable(module, found.layer) or found


def _shapes(recorder: _Recorder, call: Call, keyword: str) -> Cached | str:
    if len(recorder.seen) != 1:
        return f"it hands keys and values to its cache {len(recorder.seen)} times, not once"
    keys, values, layer = recorder.seen[0]
    if not (isinstance(keys, Tensor) and isinstance(values, Tensor) and isinstance(layer, int)):
        return "it hands something else than keys, values and the number of its layer to its cache"
    batch, tokens = call.input.shape[0], call.input.shape[1]
    heads = keys.shape[1] if keys.ndim == 4 else 0
    expected = [(batch, heads, tokens)] * 2
    if [tuple(keys.shape[:3]), tuple(values.shape[:3])] != expected or values.ndim != 4:
        return "it does not hand [batch, heads, tokens, channels] to its cache"
    return Cached(keyword, layer, heads, keys.shape[-1], values.shape[-1])


def _unpackable(module: nn.Module, layer: int) -> str | None:
    """Why transformers' own cache of a layer cannot be packed, from the model's configuration."""
    config = getattr(module, "config", None)
    if not hasattr(config, "get_text_config"):
        return None
    from transformers import DynamicCache

    from apportion.kernels.cache_layer import unpackable

    layers = DynamicCache(config=config).layers
    return unpackable(layers[layer]) if layer < len(layers) else None


def _masked(keywords: dict[str, Any], args: tuple[Any, ...], past: int) -> dict[str, Any]:
    """The keywords of attention with the mask over what a packed cache gives for its tokens."""
    hidden = first_tensor(args, keywords)
    tokens = 1 if hidden is None else hidden.shape[1]
    if tokens == 1:
        return keywords
    return {**keywords, MASK: attended(keywords.get(MASK), past, tokens)}


@dataclass
class Transient:
    """Stands for a cache where none is given: packs all keys and values, and forgets them.

    So a forward pass over a whole window gives what its tokens would give one by one.
    """

    format: CacheFormat

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Nothing is there before."""
        return 0

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """What the tokens attend to, as `PackedCache.update` gives it."""
        return PackedCache(self.format, key_states, value_states).update(key_states, value_states)


@dataclass(frozen=True)
class Packing:
    """A hook before an attention sub-block: its cache holds packed codes."""

    cached: Cached
    format: CacheFormat

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What the sub-block is given, with a cache that packs.

        Raises:
            InvalidInput: it is given a cache that cannot.
        """
        given = next((value for value in (*args, *keywords.values()) if is_cache(value)), None)
        if given is None:
            keywords = {**keywords, self.cached.keyword: Transient(self.format)}
            return args, _masked(keywords, args, 0)
        from apportion.kernels.cache_layer import pack_layer

        pack_layer(given, self.cached.layer, self.format)
        return args, _masked(keywords, args, given.get_seq_length(self.cached.layer))


def pack_cache(model: nn.Module, path: str, cached: Cached, option: Option) -> RemovableHandle:
    """Have the attention sub-block at a path keep its keys and values packed, in place.

    Args:
        model: the model.
        path: of the sub-block.
        cached: what it hands to a cache.
        option: `kNvM`.

    Returns:
        What takes it back.
    """
    if option.cache_bits is None:
        raise TypeError(f"{option} is no option of a cache")
    packing = Packing(cached, CacheFormat(*option.cache_bits))
    return model.get_submodule(path).register_forward_pre_hook(packing, with_kwargs=True)


def attention_of(site: Site) -> str:
    """Path of the attention sub-block whose cache a site is."""
    return site.name.removesuffix(f".{CACHE}")
