"""Finds the sites of any `nn.Module` by running it once and watching what each layer is given.

Nothing here lists models by name: a fused group is the layers of one module that receive the very
same tensor, a block is a member of the longest list of like modules, a sub-block is a module below
a block whose output has the shape of the block's hidden state. Matrices that no known layer holds
(experts in a stack, an LSTM's) are found by how the forward uses them, and are written back.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from apportion.spaces.batches import Batch
from apportion.spaces.choice import find_choices
from apportion.spaces.layers import Layer, find_layers, owners_of
from apportion.spaces.norms import with_norms
from apportion.spaces.probing import Call, probe
from apportion.spaces.sites import Member, Site, group_name
from apportion.spaces.uses import Views, known_views, routers, watched_views
from apportion.spaces.widths import find_widths, parted

ATTENTION_WORDS = ("attn", "attention")
MLP_WORDS = ("mlp", "ffn", "feed_forward", "feedforward")
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
# torch's own encoder reads attributes of its layers.
READ_INTO = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


@dataclass(frozen=True)
class Discovery:
    """What a model offers.

    Attributes:
        sites: blocks, then their sub-blocks, then weight sites, in the order of the modules;
            choice blocks beside the sub-blocks.
        unreached: names of the sites whose layers the batch does not reach (routed experts).
        untreated: path of a layer, parameter or choice block that is no site -> the reason.
        fixed_widths: name of a structure site without a width -> the reason.
        fixed_values: name of an attention sub-block with heads whose value dimensions stay as they
            are -> the reason. `fixed_query_keys`: likewise of their query-key dimensions.
    """

    sites: tuple[Site, ...]
    unreached: frozenset[str]
    untreated: dict[str, str]
    fixed_widths: dict[str, str]
    fixed_values: dict[str, str]
    fixed_query_keys: dict[str, str]


def discover(model: nn.Module, batch: Batch) -> Discovery:
    """Find blocks, sub-blocks and weight sites by one forward pass on `batch`, or two.

    Of like sub-blocks one is run some more times, to find its width.

    Raises:
        Exception: whatever the model itself raises on the batch.
    """
    seen = probe(model, batch)
    untreated: dict[str, str] = {}
    layers = {layer.member.module: layer for layer in find_layers(model, seen, untreated)}
    unseen: dict[str, str] = {}
    views = _views(model, batch, seen.called, layers, untreated, unseen)
    choices = _choices(model, layers, views, untreated)
    held = [*layers, *views, *choices]
    calls = {name: call for name, call in seen.calls.items() if not _is_in(name, choices)}
    blocks = _blocks(model, held, calls)
    structure = [*blocks, *_sub_blocks(model, held, blocks, calls)]
    structure += [
        Site(name, "choice", (), _parent_of(name, structure), choices=names)
        for name, names in choices.items()
    ]
    weights = [
        *_layer_sites(layers, structure, _output_head(model)),
        *_written_sites(model, views, unseen, structure),
    ]
    order = {name: place for place, (name, _) in enumerate(model.named_modules())}
    structure.sort(key=lambda site: order[site.name])
    weights.sort(key=lambda site: order[_owner(site)])
    weights = with_norms(model, blocks, weights, seen.calls)
    found = find_widths(model, structure, weights, untreated, seen.calls)
    widths, fixed_widths = parted({name: each.width for name, each in found.items()})
    values, fixed_values = parted({name: each.values for name, each in found.items()})
    query_keys, fixed_query_keys = parted({name: each.query_keys for name, each in found.items()})
    structure = [
        replace(
            site,
            width=widths.get(site.name),
            values=values.get(site.name),
            query_keys=query_keys.get(site.name),
            constant=_constant_shape(model, site, calls),
        )
        for site in structure
    ]
    unreached = {site.name for site in weights if site.members[0].module not in seen.called}
    sites = _in_tree_order(structure, weights)
    fixed = (fixed_widths, fixed_values, fixed_query_keys)
    return Discovery(sites, frozenset(unreached), untreated, *fixed)


def _owner(site: Site) -> str:
    """Path of the module that holds a weight site's first parameter."""
    return site.members[0].parameter_path.rpartition(".")[0]


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


def _views(
    model: nn.Module,
    batch: Batch,
    called: set[str],
    layers: Mapping[str, Layer],
    untreated: dict[str, str],
    unseen: dict[str, str],
) -> Views:
    """What is left of the matrices, as far as it is seen how they are used."""
    owners = owners_of(model)
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    taken = {layer.member.parameter_path for layer in layers.values()}
    left = {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.ndim >= 2 and owners[id(parameter)] == 1
        if id(parameter) not in tables and name not in taken
    }
    known = known_views(model, called, left, unseen)
    rest = {name: parameter for name, parameter in left.items() if name not in known}
    views = known | watched_views(model, batch, called, rest, unseen)
    for name, experts in routers(views).items():
        del views[name]
        untreated[name.removesuffix(".weight")] = f"a router among {experts} experts"
    for name in views:
        untreated.pop(name, None)
        untreated.pop(name.removesuffix(".weight"), None)
    return views


def _choices(
    model: nn.Module, layers: dict[str, Layer], views: Views, untreated: dict[str, str]
) -> dict[str, tuple[str, ...]]:
    """Path of each choice block -> its alternatives; takes what lies in one out of the others."""
    choices = {path: choice.names for path, choice in find_choices(model, untreated)}
    for path in [*layers, *views, *untreated]:
        if _is_in(path, choices):
            layers.pop(path, None)
            views.pop(path, None)
            untreated[path] = "it lies in a choice block: chosen or left out with its alternative"
    return choices


def _is_in(path: str, choices: Iterable[str]) -> bool:
    return any(f"{path}.".startswith(f"{choice}.") for choice in choices)


def _output_head(model: nn.Module) -> str | None:
    """Path of a transformers model's output head; other models are not asked."""
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    return next((name for name, module in model.named_modules() if module is head), None)


def _holds_matrix(name: str, held: Sequence[str]) -> bool:
    return any(path.startswith(name + ".") for path in held)


def _blocks(model: nn.Module, held: Sequence[str], calls: dict[str, Call]) -> list[Site]:
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
            if site is not None and _holds_matrix(path, held):
                blocks.append(replace(site, residual_inside=True))
    return blocks


def _sub_blocks(
    model: nn.Module, held: Sequence[str], blocks: list[Site], calls: dict[str, Call]
) -> Iterator[Site]:
    """The outermost modules below a block that are named as attention or as an MLP."""
    for block in blocks:
        found: list[str] = []
        for name, module in model.get_submodule(block.name).named_modules(prefix=block.name):
            leaf = name.rsplit(".", 1)[-1].lower()
            if name == block.name or any(name.startswith(other + ".") for other in found):
                continue
            kind = _kind_of(leaf)
            if kind is None or not _holds_matrix(name, held):
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
    name: str, kind: str, parent: str | None, calls: dict[str, Call]
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


def _constant_shape(model: nn.Module, site: Site, calls: Mapping[str, Call]) -> tuple[int, ...]:
    """`[features]`, or `[channels, 1, 1]` where what a module returns are a convolution's maps."""
    if site.choices:
        return ()
    shape = calls[site.name].input.shape
    if _gives_maps(model.get_submodule(site.name), shape):
        return (shape[1], *[1] * (len(shape) - 2))
    return (shape[-1],)


def _gives_maps(module: nn.Module, shape: Sequence[int]) -> bool:
    """Whether what a module gives is a convolution's, `[batch, channels, ...]`."""
    convolutions = [each for each in module.modules() if isinstance(each, CONVOLUTIONS)]
    if len(shape) < 3 or all(each.out_channels != shape[1] for each in convolutions):
        return False
    # [batch, tokens, features] may have as many tokens: a matrix of the features tells them apart.
    matrices = [each.shape for each in module.parameters() if each.ndim == 2]
    return len(shape) > 3 or not any(shape[-1] in each for each in matrices)


def _parent_of(path: str, structure: list[Site]) -> str | None:
    around = [site.name for site in structure if path.startswith(site.name + ".")]
    return max(around, key=len, default=None)


def _layer_sites(
    layers: Mapping[str, Layer], structure: list[Site], head: str | None
) -> Iterator[Site]:
    groups: dict[tuple[str, int, int, int], list[Member]] = {}
    for name, layer in layers.items():
        member = layer.member
        holder = name.rpartition(".")[0]
        # A convolution's group would need the same geometry too; each stays on its own.
        alone = len(groups) if member.shape.conv is not None or not holder else -1
        key = (holder, id(layer.input), member.shape.in_features, alone)
        groups.setdefault(key, []).append(member)
    for group in groups.values():
        name = group_name(group)
        kind = "linear" if group[0].shape.conv is None else "conv"
        optional = any(member.module == head for member in group)
        parent = _parent_of(group[0].module, structure)
        yield Site(name, kind, tuple(group), parent, optional=optional)


def _written_sites(
    model: nn.Module, views: Views, unseen: Mapping[str, str], structure: list[Site]
) -> Iterator[Site]:
    """One site for each parameter; the matrices of a stack, a block's experts, share it."""
    for name, members in views.items():
        module = model.get_submodule(members[0].module)
        kind = "conv" if isinstance(module, CONVOLUTIONS) else "linear"
        parent = _parent_of(name, structure)
        yield Site(name, kind, members, parent, unseen=unseen.get(name))
