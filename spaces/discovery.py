"""Finds the sites of any `nn.Module` by running it once and watching what each layer is given.

Nothing here lists models by name: a fused group is the layers of one module that receive the very
same tensor, a block is a member of the longest list of like modules, a sub-block is a module below
a block whose output has the shape of the block's hidden state.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from apportion.kernels.formats import ConvGeometry, LayerShape
from apportion.spaces.batches import Batch, call
from apportion.spaces.sites import Member, Site

ATTENTION_WORDS = ("attn", "attention")
MLP_WORDS = ("mlp", "ffn", "feed_forward", "feedforward")
SINGLE_LAYERS = "Linear, Conv1D (GPT-2) and Conv2d"
# torch's own encoder reads attributes of its layers, and weights without calling their layers.
BYPASSED = nn.TransformerEncoderLayer
READ_INTO = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


@dataclass(frozen=True)
class Discovery:
    """What a model offers.

    Attributes:
        sites: blocks, then their sub-blocks, then weight sites, in the order of the modules.
        untreated: path of a layer that holds a matrix and is no site -> the reason.
    """

    sites: tuple[Site, ...]
    untreated: dict[str, str]


@dataclass
class _Call:
    """What one module was given and returned in the probing run."""

    input: Tensor
    output: Any
    count: int = 1


@dataclass
class _Probe:
    calls: dict[str, _Call] = field(default_factory=dict)

    def hook(self, name: str) -> Callable[..., None]:
        def record(
            module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any], output: Any
        ) -> None:
            given = next((a for a in (*args, *keywords.values()) if isinstance(a, Tensor)), None)
            if given is None:
                return
            if name in self.calls:
                self.calls[name].count += 1
            else:
                self.calls[name] = _Call(given, output)

        return record


@torch.no_grad()
def _run(model: nn.Module, batch: Batch) -> dict[str, _Call]:
    probe = _Probe()
    handles = [
        module.register_forward_hook(probe.hook(name), with_kwargs=True)
        for name, module in model.named_modules()
        if name
    ]
    try:
        call(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return probe.calls


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


def discover(model: nn.Module, batch: Batch) -> Discovery:
    """Find blocks, sub-blocks and weight sites by one forward pass on `batch`.

    Raises:
        Exception: whatever the model itself raises on the batch.
    """
    calls = _run(model, batch)
    untreated: dict[str, str] = {}
    members = dict(_treatable(model, calls, untreated))
    blocks = _blocks(model, members, calls)
    structure = [*blocks, *_sub_blocks(model, members, blocks, calls)]
    head = _output_head(model)
    weights = list(_weight_sites(members, calls, structure, head))
    order = {name: place for place, (name, _) in enumerate(model.named_modules())}
    structure.sort(key=lambda site: order[site.name])
    weights.sort(key=lambda site: order[site.members[0].module])
    return Discovery(_in_tree_order(structure, weights), untreated)


def _in_tree_order(structure: list[Site], weights: list[Site]) -> tuple[Site, ...]:
    """Parents before children, children in the order of the model."""
    ordered: list[Site] = []

    def visit(parent: str | None) -> None:
        for site in (*structure, *weights):
            if site.parent == parent:
                ordered.append(site)
                if site.is_structure:
                    visit(site.name)

    visit(None)
    return tuple(ordered)


def _treatable(
    model: nn.Module, calls: dict[str, _Call], untreated: dict[str, str]
) -> Iterator[tuple[str, Member]]:
    owners = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, nn.Embedding) or not isinstance(weight, Tensor) or weight.ndim < 2:
            for path, parameter in module.named_parameters(recurse=False):
                if parameter.ndim >= 2 and not isinstance(module, nn.Embedding):
                    kind = type(module).__name__
                    place = f"{name}.{path}".removeprefix(".")
                    untreated[place] = f"{kind}: only {SINGLE_LAYERS} are treated"
            continue
        member = layer_member(name, module)
        if member is None:
            untreated[name] = _why_no_member(module)
        elif owners[id(module.weight)] > 1:
            untreated[name] = "its weight is tied to another layer's"
        elif name not in calls:
            untreated[name] = "the model's forward does not call it as a layer"
        elif calls[name].count > 1:
            untreated[name] = f"called {calls[name].count} times in one forward"
        elif isinstance(model.get_submodule(name.rpartition(".")[0]), BYPASSED):
            untreated[name] = f"{BYPASSED.__name__} may read its weight without calling it"
        else:
            yield name, member


def _why_no_member(module: nn.Module) -> str:
    if type(module) is nn.Conv2d:
        return "Conv2d: only padding with zeros, given as numbers, is treated"
    return f"{type(module).__name__}: only {SINGLE_LAYERS} are treated"


def _output_head(model: nn.Module) -> str | None:
    """Path of a transformers model's output head; other models are not asked."""
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    return next((name for name, module in model.named_modules() if module is head), None)


def _holds_member(name: str, members: dict[str, Member]) -> bool:
    return any(path.startswith(name + ".") for path in members)


def _blocks(model: nn.Module, members: dict[str, Member], calls: dict[str, _Call]) -> list[Site]:
    """The children of lists of at least two like modules that keep the hidden state's shape."""
    blocks: list[Site] = []
    for list_name, modules in model.named_modules():
        if not isinstance(modules, nn.ModuleList | nn.Sequential) or len(modules) < 2:
            continue
        if any(list_name.startswith(block.name + ".") for block in blocks):
            continue
        if len({type(child) for child in modules}) > 1 or isinstance(modules[0], READ_INTO):
            continue
        for name, _ in modules.named_children():
            path = f"{list_name}.{name}" if list_name else name
            site = _structure_site(path, "block", None, calls)
            if site is not None and _holds_member(path, members):
                blocks.append(replace(site, residual_inside=True))
    return blocks


def _sub_blocks(
    model: nn.Module, members: dict[str, Member], blocks: list[Site], calls: dict[str, _Call]
) -> Iterator[Site]:
    """The outermost modules below a block that are named as attention or as an MLP."""
    for block in blocks:
        found: list[str] = []
        for name, module in model.get_submodule(block.name).named_modules(prefix=block.name):
            leaf = name.rsplit(".", 1)[-1].lower()
            if name == block.name or any(name.startswith(other + ".") for other in found):
                continue
            kind = _kind_of(leaf)
            if kind is None or not _holds_member(name, members):
                continue
            site = _structure_site(name, kind, block.name, calls)
            if site is not None:
                found.append(name)
                hidden = calls[name].input.shape[-1]
                yield replace(site, residual_inside=_ends_in_norm(module, hidden))


def _kind_of(leaf: str) -> str | None:
    if "norm" in leaf:
        return None
    if any(word in leaf for word in ATTENTION_WORDS):
        return "attention"
    return "mlp" if any(word in leaf for word in MLP_WORDS) else None


def _ends_in_norm(module: nn.Module, hidden: int) -> bool:
    """A norm of the hidden width inside a sub-block: it adds its input itself (post-norm, BERT)."""
    return any(
        "norm" in type(child).__name__.lower()
        and (weight := getattr(child, "weight", None)) is not None
        and weight.shape[-1] == hidden
        for child in module.modules()
    )


def _structure_site(
    name: str, kind: str, parent: str | None, calls: dict[str, _Call]
) -> Site | None:
    """A module that can be dropped: called once, and what it returns looks like what it takes."""
    seen = calls.get(name)
    if seen is None or seen.count > 1:
        return None
    output = seen.output
    first = output[0] if isinstance(output, tuple) and output else output
    if not isinstance(first, Tensor) or first.shape != seen.input.shape:
        return None
    if isinstance(output, tuple):
        return Site(name, kind, (), parent, "tuple", len(output))
    return Site(name, kind, (), parent)


def _parent_of(path: str, structure: list[Site]) -> str | None:
    around = [site.name for site in structure if path.startswith(site.name + ".")]
    return max(around, key=len, default=None)


def _weight_sites(
    members: dict[str, Member],
    calls: dict[str, _Call],
    structure: list[Site],
    head: str | None,
) -> Iterator[Site]:
    groups: dict[tuple[str, int, int, int], list[Member]] = {}
    for name, member in members.items():
        given = calls[name].input
        holder = name.rpartition(".")[0]
        # A convolution's group would need the same geometry too; each stays on its own.
        alone = len(groups) if member.shape.conv is not None or not holder else -1
        key = (holder, id(given), member.shape.in_features, alone)
        groups.setdefault(key, []).append(member)
    for (holder, *_), group in groups.items():
        leaves = "+".join(member.module.rpartition(".")[2] for member in group)
        name = f"{holder}.{leaves}" if holder else leaves
        kind = "linear" if group[0].shape.conv is None else "conv"
        optional = any(member.module == head for member in group)
        parent = _parent_of(group[0].module, structure)
        yield Site(name, kind, tuple(group), parent, optional=optional)
