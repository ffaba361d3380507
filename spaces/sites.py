"""Sites: the places in a model where one choice is made."""

from dataclasses import dataclass
from typing import Literal

from apportion.kernels.formats import LayerShape

OutputForm = Literal["tensor", "tuple"]


@dataclass(frozen=True)
class Member:
    """A weight view of a site: the matrix `[out, in]` of one layer.

    Attributes:
        module: path of the layer in the model ("model.layers.0.self_attn.q_proj").
        shape: out and in features; of a convolution also its geometry.
        transposed: the layer stores `[in, out]` (GPT-2's Conv1D).
    """

    module: str
    shape: LayerShape
    transposed: bool = False


@dataclass(frozen=True)
class Site:
    """A node of the tree block > sub-block > weight site.

    Attributes:
        name: module path; of a fused group the parent and its members
            ("model.layers.3.self_attn.q_proj+k_proj+v_proj").
        kind: "block", "attention", "mlp", "linear" or "conv".
        members: the weights that share the option; empty for a structure site.
        parent: name of the innermost structure site around it, or None.
        output: what a structure site's module returns: a tensor, or a tuple that starts with one.
        output_length: how many items that tuple holds.
        residual_inside: the module adds its input itself, so dropping it returns the input;
            otherwise (and for all sub-blocks with the sum outside) dropping it returns zeros.
        optional: no site unless a pattern of the study file names it (an untied output head).
    """

    name: str
    kind: str
    members: tuple[Member, ...] = ()
    parent: str | None = None
    output: OutputForm = "tensor"
    output_length: int = 1
    residual_inside: bool = False
    optional: bool = False

    @property
    def is_structure(self) -> bool:
        """Whether the site is kept or dropped instead of stored in fewer bits."""
        return not self.members

    @property
    def weights(self) -> int:
        """Number of dense weights of all members (biases are not counted)."""
        return sum(m.shape.out_features * m.shape.in_features for m in self.members)
