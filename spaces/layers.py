"""The layers that an operator can stand in place of, because what they compute is known."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn

from apportion.kernels.formats import ConvGeometry, LayerShape
from apportion.spaces.probing import Call, Probe
from apportion.spaces.sites import Member

NO_PRODUCT = "the forward multiplies by it in no way that is known"
# torch's own encoder reads attributes of its layers, and weights without calling their layers.
BYPASSED = nn.TransformerEncoderLayer


def layer_member(name: str, module: nn.Module) -> Member | None:
    """The weight view of a layer that can be a site's member, or None for any other module."""
    if type(module) is nn.Linear:
        return Member(name, LayerShape(module.out_features, module.in_features))
    if type(module) is nn.Conv2d and module.padding_mode == "zeros":
        if isinstance(module.padding, str):
            return None
        geometry = ConvGeometry(
            kernel=(module.kernel_size[0], module.kernel_size[1]),
            stride=(module.stride[0], module.stride[1]),
            padding=(int(module.padding[0]), int(module.padding[1])),
            dilation=(module.dilation[0], module.dilation[1]),
            groups=module.groups,
        )
        in_features = module.weight[0].numel()
        return Member(name, LayerShape(module.out_channels, in_features, geometry))
    if (
        type(module).__name__ == "Conv1D"
        and type(module).__module__ == "transformers.pytorch_utils"
    ):
        in_features, out_features = cast(Tensor, module.weight).shape
        return Member(name, LayerShape(out_features, in_features), transposed=True)
    return None


@dataclass(frozen=True)
class Layer:
    """A layer that an operator can replace, and what it is given."""

    member: Member
    input: Tensor


def find_layers(model: nn.Module, seen: Probe, untreated: dict[str, str]) -> Iterator[Layer]:
    """The layers that an operator can replace; of all others with a matrix, the reason."""
    owners = owners_of(model)
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            continue
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor) or weight.ndim < 2:
            for path, parameter in module.named_parameters(recurse=False):
                if parameter.ndim >= 2:
                    place = f"{name}.{path}".removeprefix(".")
                    untreated[place] = f"{type(module).__name__}: {NO_PRODUCT}"
            continue
        member = layer_member(name, module)
        call = seen.calls.get(name) or _like_expert(model, name, seen)
        if owners[id(weight)] > 1:
            untreated[name] = "its weight is tied to another layer's"
        elif member is None:
            untreated[name] = f"{type(module).__name__}: {NO_PRODUCT}"
        elif call is None:
            untreated[name] = "the model's forward does not call it as a layer"
        elif call.count > 1:
            untreated[name] = f"called {call.count} times in one forward"
        elif isinstance(model.get_submodule(name.rpartition(".")[0]), BYPASSED):
            untreated[name] = f"{BYPASSED.__name__} may read its weight without calling it"
        else:
            yield Layer(member, call.input)


def owners_of(model: nn.Module) -> Counter[int]:
    """Id of a parameter -> how many modules hold it."""
    return Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))


def tied_names(model: nn.Module) -> dict[str, set[str]]:
    """Name in the model's state -> all names of the same storage."""
    by_place: dict[int, set[str]] = {}
    for name, tensor in model.state_dict().items():
        by_place.setdefault(tensor.data_ptr(), set()).add(name)
    return {name: names for names in by_place.values() for name in names}


def _like_expert(model: nn.Module, name: str, seen: Probe) -> Call | None:
    """What the same layer of a like item of its list was given, where the list's own was skipped.

    A routed expert that the batch does not reach is a layer like those that it reaches.
    """
    parts = name.split(".")
    for place in (place for place, part in enumerate(parts) if part.isdigit()):
        before, after = ".".join(parts[:place]), ".".join(parts[place + 1 :])
        items = model.get_submodule(before)
        if isinstance(items, nn.ModuleList) and f"{before}.{parts[place]}" not in seen.called:
            others = (f"{before}.{other}" for other, _ in items.named_children())
            likes = (f"{other}.{after}".removesuffix(".") for other in others)
            return next((seen.calls[like] for like in likes if like in seen.calls), None)
    return None
