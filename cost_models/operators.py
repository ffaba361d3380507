"""The operators of a space: what its options launch, each distinct one once."""

import copy
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from apportion.cost_models.harness import Call
from apportion.cost_models.random_weights import random_stored
from apportion.hashing import content_hash
from apportion.kernels.formats import DTYPES, Format, LayerShape
from apportion.kernels.group import members as group_members
from apportion.kernels.registry import implementation, serving
from apportion.spaces.apply import WRITTEN_BACK, bias_of
from apportion.spaces.grammar import Option
from apportion.spaces.padding import DENSE_DTYPES, ZEROS, Padding, paddings, served_by
from apportion.spaces.parts import Part, first_units, parts, treated_site
from apportion.spaces.sites import Member, Site
from apportion.spaces.space import Space

DEVICE = "cpu"
ORIGINAL = "dense"
"""In place of an implementation's name: the model's own layers, called one after another."""
SHORT_DTYPES = {"float32": "f32", "bfloat16": "bf16", "float16": "fp16"}
MOST_COPIES = 32


@dataclass(frozen=True)
class Given:
    """What a weight site's layers are called with: the shape and the dtype of their input."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Operator:
    """What one site launches under one option; equal operators are measured once.

    Attributes:
        implementation: its name, or "dense"; what holds zeros runs as what does not.
        layers: class names of the model's own layers; empty for any implementation.
        formats: of the members, as far as the implementation distinguishes them.
        shapes: of the members.
        biases: which members have one.
        given: their input.
        threads: intra-op threads.
        padded: of each member what it is padded by, or None; empty: none is.
    """

    implementation: str
    layers: tuple[str, ...]
    formats: tuple[Format, ...]
    shapes: tuple[LayerShape, ...]
    biases: tuple[bool, ...]
    given: Given
    threads: int
    padded: tuple[Padding | None, ...] = ()

    @cached_property
    def description(self) -> dict[str, Any]:
        """All of it as JSON."""
        described = {
            "implementation": served_by(self.implementation),
            "layers": list(self.layers),
            "formats": [f.to_json() for f in self.formats],
            "shapes": [s.to_json() for s in self.shapes],
            "biases": list(self.biases),
            "input": [list(self.given.shape), self.given.dtype],
            "threads": self.threads,
        }
        if any(self.padded):
            described["padded"] = [each and [each.units, len(each.kept)] for each in self.padded]
        return described

    @cached_property
    def key(self) -> str:
        """Content hash of the description."""
        return content_hash(self.description)

    @property
    def dense_bytes(self) -> int:
        """Bytes of the members' dense weights."""
        return sum(s.weights for s in self.shapes) * DTYPES[self.given.dtype].itemsize


Program = tuple[Operator, ...]
"""What one site launches under one option, an operator for each input that its layers share."""


def model_dtype(model: nn.Module) -> str:
    """The dtype of the first floating parameter: "float32", "bfloat16" or "float16"."""
    found = (p.dtype for p in model.parameters() if p.is_floating_point())
    return str(next(found, torch.float32)).removeprefix("torch.")


def observe(
    model: nn.Module, space: Space, run: Callable[[], object], also: Iterable[str] = ()
) -> dict[str, Given]:
    """Path of a layer, choice block or site of `drop:mean` -> what it is given in one run.

    Modules at the paths `also` are seen as well. Of layers that share an input the first is. What
    is not called, or is no layer but written back, is left out.
    """
    seen: dict[str, Given] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def note(module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            given = next((a for a in (*args, *keywords.values()) if isinstance(a, Tensor)), None)
            if given is not None:
                dtype = str(given.dtype).removeprefix("torch.")
                seen.setdefault(name, Given(tuple(given.shape), dtype))

        return note

    watched = [site.name for site in space.sites if site.choices]
    watched += [*(site.name for site in space.mean_sites), *also]
    watched += [g[0].module for s in space.sites for g in s.groups if not g[0].written_back]
    handles = [
        model.get_submodule(path).register_forward_pre_hook(hook(path), with_kwargs=True)
        for path in dict.fromkeys(watched)
    ]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return seen


def original_operator(
    model: nn.Module, members: Sequence[Member], given: Given, threads: int
) -> Operator:
    """The model's own layers, that share an input."""
    modules = [model.get_submodule(member.module) for member in members]
    return Operator(
        implementation=ORIGINAL,
        layers=tuple(type(module).__name__ for module in modules),
        formats=(),
        shapes=tuple(member.shape for member in members),
        biases=_biases(model, members),
        given=given,
        threads=threads,
    )


def candidate_programs(
    model: nn.Module,
    site: Site,
    option: Option,
    given: Sequence[Given],
    threads: int,
    rank_multiple: int,
) -> list[Program]:
    """What could run an option: one program for every implementation that serves all of it.

    Args:
        model: the dense model.
        site: a weight site, or a sub-block with a width.
        option: of a sub-block a treatment.
        given: of each of `site.groups` the input.
        threads: intra-op threads.
        rank_multiple: ranks of rP% are multiples of it.
    """
    launched = parts(site, option, model_dtype(model), rank_multiple)
    served = [[i.name for i in serving(p.formats[0], p.shapes, DEVICE)] for p in launched]
    everywhere = [name for name in served[0] if all(name in names for names in served)]
    kept, width = first_units(site, option, rank_multiple), treated_site(site, option).width
    padding = {} if width is None or kept is None else paddings(width, kept)
    padded = [tuple(padding.get(member) for member in part.members) for part in launched]
    if any(map(any, padded)):
        everywhere += [f"{name}{ZEROS}" for name in everywhere if name in DENSE_DTYPES]
    return [
        tuple(
            _operator(model, part, name, seen, around, threads)
            for part, seen, around in zip(launched, given, padded, strict=True)
        )
        for name in everywhere
    ]


def _operator(
    model: nn.Module,
    part: Part,
    name: str,
    given: Given,
    padded: tuple[Padding | None, ...],
    threads: int,
) -> Operator:
    """What one part launches: of layers as large as the model's where it holds zeros."""
    zeros, pads = name != served_by(name), any(padded)
    return Operator(
        implementation=name,
        layers=(),
        formats=tuple(_as_run(served_by(name), format) for format in part.formats),
        shapes=tuple(member.shape for member in part.members) if zeros else part.shapes,
        biases=_biases(model, part.members),
        given=given if zeros or pads else _narrowed(given, part),
        threads=threads,
        padded=padded if pads and not zeros else (),
    )


def _narrowed(given: Given, part: Part) -> Given:
    """The input of a part whose layers may be narrower than the model's."""
    dense, now = part.members[0].shape, part.shapes[0]
    if dense.in_features == now.in_features and dense.conv == now.conv:
        return given
    if now.conv is None:
        return replace(given, shape=(*given.shape[:-1], now.in_features))
    positions = now.conv.kernel[0] * now.conv.kernel[1]
    channels = now.in_features // positions * now.conv.groups
    return replace(given, shape=(given.shape[0], channels, *given.shape[2:]))


def runs_dense(site: Site, dtype: str) -> str:
    """What runs any stored weight of a site dense: in the model's dtype, or written back."""
    if site.written_back:
        return WRITTEN_BACK
    convolves = any(member.shape.conv for group in site.groups for member in group)
    family = "conv" if convolves else "linear"
    return f"{family}.{SHORT_DTYPES[dtype]}"


def _as_run(name: str, format: Format) -> Format:
    """The format as far as the implementation's running time depends on it.

    Dense operators unpack whatever is stored when they are built, so all formats run alike;
    a convolution's low-rank pair alone stays one.
    """
    family, _, short = name.partition(".")
    if family == "linear" or (family == "conv" and format.rank is None):
        return Format(next(long for long, each in SHORT_DTYPES.items() if each == short))
    return format


def _biases(model: nn.Module, members: Sequence[Member]) -> tuple[bool, ...]:
    return tuple(bias_of(model, member.module) is not None for member in members)


def copies_of(operator: Operator, footprint: float) -> int:
    """Copies to rotate over, so that weights are as cold as among `footprint` bytes of others."""
    return max(1, min(MOST_COPIES, math.ceil(footprint / max(1, operator.dense_bytes))))


def original_layers(
    model: nn.Module, members: Sequence[Member], copies: int
) -> list[list[nn.Module]]:
    """Copies of the model's own layers, as `rotation` takes them."""
    modules = [model.get_submodule(member.module) for member in members]
    return [[copy.deepcopy(module) for module in modules] for _ in range(copies)]


def built_layers(operator: Operator, copies: int, seed: int) -> list[list[nn.Module]]:
    """Copies of an operator with random weights, as the modules that stand in a model."""
    stored = [
        random_stored(format, shape, seed + place)
        for place, (format, shape) in enumerate(zip(operator.formats, operator.shapes, strict=True))
    ]
    dtype = DTYPES[operator.given.dtype]
    biases = [
        torch.zeros(shape.out_features, dtype=dtype) if has else None
        for has, shape in zip(operator.biases, operator.shapes, strict=True)
    ]
    built = implementation(served_by(operator.implementation)).build(stored, biases)
    padded = operator.padded or (None,) * len(operator.shapes)

    def members() -> list[nn.Module]:
        layers = group_members(copy.deepcopy(built), len(operator.shapes))
        pairs = zip(layers, padded, strict=True)
        return [layer if padding is None else padding.around(layer) for layer, padding in pairs]

    return [members() for _ in range(copies)]


def rotation(layers: Sequence[Sequence[nn.Module]], given: Given) -> Call:
    """One call of the members, in their order and on one input; the next call takes the next copy.

    To be called without gradients.
    """
    x = torch.randn(given.shape, dtype=DTYPES[given.dtype])
    copies = itertools.cycle(layers)

    def once() -> None:
        for layer in next(copies):
            layer(x)

    return once


def round_of(layers: Sequence[Sequence[nn.Module]], given: Given) -> Call:
    """All copies once, one after another."""
    once = rotation(layers, given)
    count = len(layers)

    def everything() -> None:
        for _ in range(count):
            once()

    return everything


def sum_with(given: Given, shape: tuple[int, ...]) -> Call:
    """One sum of a tensor like `given` and a constant of a shape that broadcasts to it."""
    x = torch.randn(given.shape, dtype=DTYPES[given.dtype])
    constant = torch.randn(shape, dtype=DTYPES[given.dtype])
    return lambda: x + constant
