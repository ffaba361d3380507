"""Sites: the places in a model where one choice is made."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

from apportion.kernels.formats import LayerShape

OutputForm = Literal["tensor", "tuple"]


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
class Site:
    """A node of the tree block > sub-block > weight site, or a choice block.

    Attributes:
        name: module path; of a fused group the parent and its members
            ("model.layers.3.self_attn.q_proj+k_proj+v_proj"); of what is written back the
            parameter ("model.layers.0.mlp.experts.down_proj", whose members are the experts).
        kind: "block", "attention", "mlp", "linear", "conv" or "choice".
        members: the weights that share the option; empty for a structure site or choice block.
        parent: name of the innermost structure site around it, or None.
        output: what a structure site's module returns: a tensor, or a tuple that starts with one.
        output_length: how many items that tuple holds.
        residual_inside: the module adds its input itself, so dropping it returns the input;
            otherwise (and for all sub-blocks with the sum outside) dropping it returns zeros.
        optional: no site unless a pattern of the study file names it (an untied output head).
        choices: of a choice block the names of its alternatives, the dense model's first.
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

    @property
    def is_structure(self) -> bool:
        """Whether an option says what runs (keep or drop, op:NAME), not how weights are stored."""
        return not self.members

    @property
    def written_back(self) -> bool:
        """Whether realized weights become parameters: true loss and bytes, the dense latency."""
        return any(member.written_back for member in self.members)

    @property
    def weights(self) -> int:
        """Number of dense weights of all members (biases are not counted)."""
        return sum(m.shape.out_features * m.shape.in_features for m in self.members)
