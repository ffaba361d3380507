"""Sites: the places in a model where one choice is made."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, Self

from apportion.kernels.formats import LayerShape
from apportion.spaces.folding import Norm

OutputForm = Literal["tensor", "tuple"]
Side = Literal["out", "in", "groups", "whole"]
LATER_OF_CUTS = ("narrowing", "heads", "keys")
CACHE = "cache"
"""A kind of site, and what its name has after that of its attention sub-block."""


@dataclass(frozen=True)
class Member:
    """A weight view of a site: one matrix `[out, in]` of a model's parameters.

    Attributes:
        module: path of the module that reads it ("model.layers.0.self_attn.q_proj").
        shape: out and in features; of a convolution also its geometry.
        transposed: it is stored as `[in, out]` (GPT-2's Conv1D).
        parameter: name of the parameter below the module ("in_proj_weight", "out_proj.weight").
        index: which matrix of a stack `[count, ...]` (an expert); None: the whole parameter.
        written_back: no operator can stand in the module's place, because its forward is not
            known: realized weights become the parameter's values.
    """

    module: str
    shape: LayerShape
    transposed: bool = False
    parameter: str = "weight"
    index: int | None = None
    written_back: bool = False

    @property
    def parameter_path(self) -> str:
        """Name of the parameter in the model's state."""
        return f"{self.module}.{self.parameter}" if self.module else self.parameter

    @property
    def path(self) -> str:
        """A name that no other member has: of a layer its module, else the view."""
        if not self.written_back:
            return self.module
        return self.parameter_path if self.index is None else f"{self.parameter_path}.{self.index}"

    def to_json(self) -> dict[str, Any]:
        """As an artifact describes it: a layer by module and shape alone."""
        layer = {"module": self.module, "shape": self.shape.to_json()}
        if not self.written_back:
            return layer
        view = {"parameter": self.parameter, "index": self.index, "transposed": self.transposed}
        return {**layer, **view}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Inverse of `to_json` for what is written back; of a layer all that installing needs."""
        view = {key: value[key] for key in ("parameter", "index", "transposed") if key in value}
        shape = LayerShape.from_json(value["shape"])
        return cls(value["module"], shape, **view, written_back="parameter" in value)


@dataclass(frozen=True)
class Cut:
    """How a member of a sub-block becomes narrower when units of it are left out.

    Attributes:
        member: the weight view `[out, in]`.
        side: units are its rows ("out"), its columns ("in"), the groups of a grouped convolution
            ("groups": rows too), or it keeps its shape ("whole").
        features: neighbouring rows or columns that belong to one unit (a head's features).
        stacks: how often all units lie there, one after the other (gate and up in one matrix: 2).
        narrowing: numbers of the stacks that have fewer units, where the others keep all (the
            values in a matrix of queries, keys and values); none named: all have fewer.
        heads: of each stack of query-key dimensions the number of the key-value head that it is of,
            -1 where it keeps all rows; none named: it is no cut in such dimensions.
        keys: numbers of the stacks in `heads` that are keys; the others are queries.
    """

    member: Member
    side: Side
    features: int = 1
    stacks: int = 1
    narrowing: tuple[int, ...] = ()
    heads: tuple[int, ...] = ()
    keys: tuple[int, ...] = ()

    def to_json(self) -> dict[str, Any]:
        told = {**asdict(self), "member": asdict(self.member)}
        for name in LATER_OF_CUTS:
            if not told[name]:
                del told[name]  # what was written before there were any keeps its hash
        return told

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        shape = LayerShape.from_json(value["member"]["shape"])
        member = Member(**{**value["member"], "shape": shape})
        later = {name: tuple(value.get(name, ())) for name in LATER_OF_CUTS}
        return cls(**{**value, "member": member, **later})

    def places(self, kept: Sequence[int], units: int) -> list[int]:
        """Rows (columns where `side` is "in") of the kept units, ascending as the units are.

        Args:
            kept: numbers of the units that stay.
            units: how many there are.
        """
        if self.heads:
            return self._places_by_head(kept)
        width = self.features
        return [
            (stack * units + unit) * width + feature
            for stack in range(self.stacks)
            for unit in (range(units) if self._is_whole(stack) else kept)
            for feature in range(width)
        ]

    def narrowed(self, kept: int) -> LayerShape:
        """The member's shape with so many units."""
        shape = self.member.shape
        whole = sum(self._is_whole(stack) for stack in range(self.stacks))
        units = kept // (max(self.heads) + 1) if self.heads else kept
        count = units * self.features * (self.stacks - whole)
        count += whole * (shape.out_features // self.stacks)
        if self.side == "whole":
            return shape
        if self.side == "in":
            return replace(shape, in_features=count)
        if self.side == "groups" and shape.conv is not None:
            return replace(shape, out_features=count, conv=replace(shape.conv, groups=kept))
        return replace(shape, out_features=count)

    def _is_whole(self, stack: int) -> bool:
        if self.heads:
            return self.heads[stack] < 0
        return bool(self.narrowing) and stack not in self.narrowing

    def _places_by_head(self, kept: Sequence[int]) -> list[int]:
        """Rows where each key-value head has units of its own, numbered one head after another."""
        size = self.member.shape.out_features // self.stacks
        return [
            stack * size + row
            for stack, head in enumerate(self.heads)
            for row in (range(size) if head < 0 else (u % size for u in kept if u // size == head))
        ]


@dataclass(frozen=True)
class Experts:
    """Where the experts of a sub-block lie.

    Attributes:
        routers: of `tensors` the matrices `[experts, in]` that give each expert its logit.
        tensors: names of all parameters and buffers `[experts, ...]`, but for those in `lists`.
        lists: paths of lists of like modules, one for each expert.
        least: fewer are not enough for a token.
        channels: how each matrix of the first expert holds the channels of an expert; none: not
            known, or its experts have biases.
    """

    routers: tuple[str, ...]
    tensors: tuple[str, ...]
    lists: tuple[str, ...]
    least: int
    channels: tuple[Cut, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "channels": [cut.to_json() for cut in self.channels]}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        routers, tensors, lists = (tuple(value[key]) for key in ("routers", "tensors", "lists"))
        channels = tuple(map(Cut.from_json, value["channels"]))
        return cls(routers, tensors, lists, value["least"], channels)


@dataclass(frozen=True)
class Width:
    """What a sub-block is wide by: units that can be left out without a change of its interface.

    Attributes:
        unit: "head" (a key-value head and its queries), "channel", "expert", "value" (a dimension
            of what each key-value head gives) or "query-key" (a dimension of one key-value head's
            keys and of its queries; numbered one head after another, each keeps as many).
        units: how many there are.
        groups: all weights of the sub-block; those of a group are given the same input and run as
            one operator. Of experts: first one group for each expert, with all its matrices, then
            the others; none of the router.
        norms: paths of modules between them whose vectors `[units]` follow.
        experts: of experts, where they lie.
        pairs: of query-key units, for each dimension of a head the one that it is rotated with
            (rotary embeddings), itself where none; none named: none is rotated.
    """

    unit: Literal["head", "channel", "expert", "value", "query-key"]
    units: int
    groups: tuple[tuple[Cut, ...], ...]
    norms: tuple[str, ...] = ()
    experts: Experts | None = None
    pairs: tuple[int, ...] = ()

    def to_json(self) -> dict[str, Any]:
        groups = [[cut.to_json() for cut in group] for group in self.groups]
        told: dict[str, Any] = {"unit": self.unit, "units": self.units, "groups": groups}
        told["norms"] = self.norms
        told |= {"pairs": self.pairs} if self.pairs else {}
        return told if self.experts is None else {**told, "experts": self.experts.to_json()}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        groups = tuple(tuple(map(Cut.from_json, group)) for group in value["groups"])
        experts = Experts.from_json(value["experts"]) if "experts" in value else None
        norms, pairs = tuple(value["norms"]), tuple(value.get("pairs", ()))
        return cls(value["unit"], value["units"], groups, norms, experts, pairs)

    @property
    def cuts(self) -> tuple[Cut, ...]:
        """Those of all groups."""
        return tuple(cut for group in self.groups for cut in group)

    @property
    def heads(self) -> int:
        """Of query-key units how many heads have each its own; 1 of any other."""
        return 1 + max((head for cut in self.cuts for head in cut.heads), default=0)

    def left(self, kept: int) -> tuple[tuple[Cut, ...], ...]:
        """The groups of a sub-block of so many units; experts are alike and move up."""
        if self.experts is None:
            return self.groups
        return self.groups[:kept] + self.groups[self.units :]

    def members(self, kept: int) -> tuple[Member, ...]:
        """All weights of a sub-block of so many units."""
        return tuple(cut.member for group in self.left(kept) for cut in group)


@dataclass(frozen=True)
class Cached:
    """What an attention sub-block hands to a key-value cache for each token.

    Attributes:
        keyword: of its forward, which takes the cache.
        layer: number of the cache's layer.
        heads: key-value heads.
        key_channels: of each head.
        value_channels: of each head.
    """

    keyword: str
    layer: int
    heads: int
    key_channels: int
    value_channels: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        return cls(**value)


@dataclass(frozen=True)
class Site:
    """A node of the tree block > sub-block > weight site, or a choice block.

    Attributes:
        name: module path; of a fused group the parent and its members
            ("model.layers.3.self_attn.q_proj+k_proj+v_proj"); of what is written back the
            parameter ("model.layers.0.mlp.experts.down_proj", whose members are the experts).
        kind: "block", "attention", "mlp", "linear", "conv", "choice" or "cache"; "experts" of what
            stands for a sub-block's experts among those that calibration watches.
        members: the weights that share the option; empty for a structure site or choice block.
        parent: name of the innermost structure site around it, or None.
        output: what a structure site's module returns: a tensor, or a tuple that starts with one.
        output_length: how many items that tuple holds.
        residual_inside: the module adds its input itself, so dropping it returns the input;
            otherwise (and for all sub-blocks with the sum outside) dropping it returns zeros.
        optional: no site unless a pattern of the study file names it (an untied output head).
        choices: of a choice block the names of its alternatives, the dense model's first.
        width: what a structure site can be made narrower by (`cP%`), or None; of a
            `parts.treated_site` what its option leaves less of.
        values: the width of an attention sub-block in value dimensions (`vP%`), or None.
        query_keys: its width in query-key dimensions (`qP%`), or None.
        constant: shape of the constant that `drop:mean` adds in place of a structure site:
            `[features]`, or `[channels, 1, 1]` of a convolutional one.
        unseen: why nobody sees what weights that are written back are multiplied with, or None.
        norm: what a weight site alone reads and can take in scales of its inputs, or None.
        cache: of a cache what its attention hands to it ("model.layers.3.self_attn.cache").
    """

    name: str
    kind: str
    members: tuple[Member, ...] = ()
    parent: str | None = None
    output: OutputForm = "tensor"
    output_length: int = 1
    residual_inside: bool = False
    optional: bool = False
    choices: tuple[str, ...] = ()
    width: Width | None = None
    values: Width | None = None
    constant: tuple[int, ...] = ()
    unseen: str | None = None
    query_keys: Width | None = None
    norm: Norm | None = None
    cache: Cached | None = None

    @property
    def is_structure(self) -> bool:
        """Whether an option says what runs (keep or drop, op:NAME, kNvM), not how weights are
        stored."""
        return not self.members

    @property
    def groups(self) -> tuple[tuple[Member, ...], ...]:
        """Its weights by what they are given: of a weight site one group, of a width its own.

        The matrices of a stack are given each its own (an expert its tokens).
        """
        if (width := self._any_width) is not None:
            return tuple(tuple(cut.member for cut in group) for group in width.groups)
        if self._is_stack:
            return tuple((member,) for member in self.members)
        return (self.members,) if self.members else ()

    @property
    def _any_width(self) -> Width | None:
        return self.width or self.values or self.query_keys

    @property
    def _is_stack(self) -> bool:
        return any(member.index is not None for member in self.members)

    @property
    def input_names(self) -> tuple[str, ...]:
        """Of each group the name that the statistics of its input have; of experts one name."""
        if self.has_experts:
            return (f"{self.name}:experts",)
        if self._any_width is None:
            return tuple(m.path for m in self.members) if self._is_stack else (self.name,)
        return tuple(group_name(group) for group in self.groups)

    @property
    def written_back(self) -> bool:
        """Whether realized weights become parameters: true loss and bytes, the dense latency."""
        return any(member.written_back for member in self.members)

    @property
    def has_experts(self) -> bool:
        """Whether its width is in experts: what a treatment leaves of them is written back."""
        return self.width is not None and self.width.experts is not None

    @property
    def weights(self) -> int:
        """Number of dense weights of all members (biases are not counted)."""
        return sum(m.shape.out_features * m.shape.in_features for m in self.members)


def group_name(members: Sequence[Member]) -> str:
    """Name of the weight site of layers that share an input: "PARENT.q_proj+k_proj+v_proj"."""
    holder = members[0].module.rpartition(".")[0]
    leaves = "+".join(member.module.rpartition(".")[2] for member in members)
    return f"{holder}.{leaves}" if holder else leaves
