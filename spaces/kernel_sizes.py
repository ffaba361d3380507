"""Elastic kernel sizes: a convolution whose smaller kernels are centers of its own weights.

A smaller kernel is the center of the next larger one, multiplied by a matrix that is learned with
the weights (Cai and others, 2020, "Once-for-All", section 3.3: kernel transformation matrices, one
for each smaller size of a layer, shared by its channels). What a study measures, counts and exports
is the plain convolution that comes of it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, linear

from apportion.errors import InvalidInput
from apportion.spaces.choice import Choice

NAME = "elastic_kernel"


class CenterKernel(nn.Module):
    """Runs a convolution with the transformed center of its weights.

    Its one parameter is `transform` `[size * size, size * size]`, the identity at first.
    """

    def __init__(self, whole: nn.Conv2d, larger: "CenterKernel | None", size: int) -> None:
        """Takes the convolution, the kernel whose center it is (None: the whole), and its size."""
        super().__init__()
        # In a tuple they are no submodules: their weights are stored and trained where they lie.
        self._around = (whole, larger)
        self.size = size
        self.transform = nn.Parameter(torch.eye(size * size).to(whole.weight))

    def kernel(self) -> Tensor:
        """Its weights `[out, in / groups, size, size]`; gradients flow to all that they are of."""
        whole, larger = self._around
        outer = whole.weight if larger is None else larger.kernel()
        margin = (outer.shape[-1] - self.size) // 2
        center = outer[..., margin:-margin, margin:-margin].flatten(-2)
        return linear(center, self.transform).view(*center.shape[:-1], self.size, self.size)

    def forward(self, x: Tensor) -> Tensor:
        """Maps `[n, in, height, width]` -> those of the whole convolution's shape."""
        whole = self._around[0]
        padding = _padding(whole, self.size)
        return conv2d(
            x, self.kernel(), whole.bias, whole.stride, padding, whole.dilation, whole.groups
        )

    def plain(self) -> nn.Conv2d:
        """A convolution of its own that gives the same, to the bit."""
        whole = self._around[0]
        found = nn.Conv2d(
            whole.in_channels,
            whole.out_channels,
            self.size,
            (whole.stride[0], whole.stride[1]),
            _padding(whole, self.size),
            (whole.dilation[0], whole.dilation[1]),
            whole.groups,
            device="meta",
        )
        bias = whole.bias
        found.weight = nn.Parameter(self.kernel().detach())
        found.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        return found.train(self.training)

    @property
    def plain_parameters(self) -> int:
        """The number of parameters of `plain`."""
        whole = self._around[0]
        bias = 0 if whole.bias is None else whole.out_channels
        return whole.weight[..., 0, 0].numel() * self.size**2 + bias


def elastic_kernel(conv: nn.Conv2d, sizes: Sequence[int]) -> Choice:
    """A choice block of a convolution with kernels of several sizes that share its weights.

    Stride, dilation, groups and bias are the convolution's; its padding shrinks with the kernel, so
    that all sizes give maps of the same shape.

    Args:
        conv: with a square kernel; it is the first alternative, and is not copied.
        sizes: odd, the largest first: that of `conv`. 7 is the option `op:k7`.

    Raises:
        InvalidInput: a layer or sizes of another kind, or too little padding to shrink.
    """
    if type(conv) is not nn.Conv2d or conv.padding_mode != "zeros":
        mode = f' with padding_mode "{conv.padding_mode}"' if type(conv) is nn.Conv2d else ""
        raise InvalidInput(
            f'{NAME} takes an nn.Conv2d with padding_mode "zeros", not {type(conv).__name__}{mode}'
        )
    _refuse_sizes(conv, sizes)
    _refuse_padding(conv, sizes)
    alternatives: dict[str, nn.Module] = {f"k{sizes[0]}": conv}
    larger = None
    for size in sizes[1:]:
        larger = CenterKernel(conv, larger, size)
        alternatives[f"k{size}"] = larger
    return Choice(alternatives)


@torch.no_grad()
def make_kernels_plain(model: nn.Module) -> nn.Module:
    """Give each `CenterKernel` of a model weights of its own, in place; returns the model."""
    smaller = [(p, m) for p, m in model.named_modules() if isinstance(m, CenterKernel)]
    for path, module in smaller:
        model.set_submodule(path, module.plain())
    return model


def plain_parameters(module: nn.Module) -> int:
    """The number of parameters in a module after `make_kernels_plain`; none is tied to another."""
    return sum(
        each.plain_parameters
        if isinstance(each, CenterKernel)
        else sum(parameter.numel() for parameter in each.parameters(recurse=False))
        for each in module.modules()
    )


def _padding(conv: nn.Conv2d, size: int) -> str | tuple[int, int]:
    """The padding with which a smaller kernel gives maps of the same shape."""
    if isinstance(conv.padding, str):  # "same"; "valid" is refused
        return conv.padding
    height, width = (
        padding - dilation * (conv.kernel_size[0] - size) // 2
        for padding, dilation in zip(conv.padding, conv.dilation, strict=True)
    )
    return height, width


def _refuse_sizes(conv: nn.Conv2d, sizes: Sequence[int]) -> None:
    rows, columns = conv.kernel_size
    given = ", ".join(map(str, sizes))
    if rows != columns:
        raise InvalidInput(f"{NAME} takes a square kernel, not one of {rows} x {columns}")
    if len(sizes) < 2 or sizes[0] != rows:
        raise InvalidInput(
            f"sizes of {NAME} are ({given}); they begin with the kernel's own, {rows}, and then "
            "come smaller ones"
        )
    if any(later >= size for size, later in zip(sizes, sizes[1:], strict=False)):
        raise InvalidInput(f"sizes of {NAME} are ({given}); each is smaller than the one before")
    for size in sizes:
        if size < 1 or size % 2 == 0:
            raise InvalidInput(
                f"sizes of {NAME} are ({given}); {size} is no odd number above 0, so it has no "
                "center that lies where the others have theirs"
            )


def _refuse_padding(conv: nn.Conv2d, sizes: Sequence[int]) -> None:
    if conv.padding == "same":
        return
    given = (0, 0) if isinstance(conv.padding, str) else conv.padding
    needed = tuple(dilation * (sizes[0] - sizes[-1]) // 2 for dilation in conv.dilation)
    if any(have < need for have, need in zip(given, needed, strict=True)):
        raise InvalidInput(
            f"the padding {conv.padding} of {NAME} cannot shrink with the kernel from {sizes[0]} "
            f"to {sizes[-1]}: it has to be at least {needed}"
        )
