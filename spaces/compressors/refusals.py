"""Why a step of an option cannot be had for a layer, and what fits nearest."""

from dataclasses import replace
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal

from apportion.kernels.formats import LayerShape
from apportion.spaces.compressors.ranks import least_percent, ranks_of
from apportion.spaces.compressors.sparsify import removed_count
from apportion.spaces.grammar import ALWAYS_SYMMETRIC, WITHOUT_STATISTICS, Option


def method_refusal(option: Option, shape: LayerShape) -> str | None:
    """The reason where a method needs statistics of the inputs, and they are no single matrix."""
    if shape.conv is None or shape.conv.groups == 1:
        return None
    for step, method in option.methods:
        if method not in WITHOUT_STATISTICS and (step, method) != ("w", "rtn"):
            methods = tuple(pair for pair in option.methods if pair[0] != step)
            return (
                f"{method} needs statistics of the inputs, and grouped convolutions have none;"
                f" nearest: {replace(option, methods=methods)}"
            )
    return None


def range_refusal(option: Option, shape: LayerShape) -> str | None:
    """The reason where one scale for all inputs needs their range, and calibration sees none."""
    if not option.static_activations or shape.conv is None or shape.conv.groups == 1:
        return None
    return (
        "a8s needs the range of the inputs, and grouped convolutions have no statistics;"
        f" nearest: {replace(option, static_activations=False)}"
    )


def scaling_refusal(option: Option, shape: LayerShape) -> str | None:
    """The reason where the layer meets an input with several weights of a kernel, not with one."""
    if not option.scales_inputs or shape.conv is None or shape.conv.kernel == (1, 1):
        return None
    rows, columns = shape.conv.kernel
    methods = tuple(pair for pair in option.methods if pair[0] != "w")
    return (
        f"awq is realized for kernels of 1 x 1, not {rows} x {columns};"
        f" nearest: {replace(option, methods=methods)}"
    )


def group_refusal(option: Option, shape: LayerShape) -> str | None:
    """The reason where the group does not divide the inputs; None otherwise."""
    inputs = shape.in_features
    if option.group is None or inputs % option.group == 0:
        return None
    fitting = ", ".join(_fitting_groups(option, inputs))
    return f"group {option.group} does not divide {inputs} inputs; nearest: {fitting}"


def _fitting_groups(option: Option, inputs: int) -> list[str]:
    """The option with the nearest smaller and larger group that divides `inputs`, at least 8."""
    groups = [group for group in range(8, inputs + 1) if inputs % group == 0]
    wanted = option.group or 0
    nearest = [group for group in groups if group < wanted][-1:]
    nearest += [group for group in groups if group > wanted][:1]
    if not nearest:
        return [str(replace(option, group=None, symmetric=option.bits in ALWAYS_SYMMETRIC))]
    return [str(replace(option, group=group)) for group in nearest]


def pattern_refusal(option: Option, shape: LayerShape) -> str | None:
    """The reason where M of N:M does not divide the inputs, or these are no channels."""
    if not isinstance(option.sparsity, tuple):
        return None
    n, m = option.sparsity
    percent = round(Decimal(100 * (m - n)) / m, 1)
    share = replace(option, sparsity=min(max(percent, Decimal("0.1")), Decimal("99.9")))
    if shape.conv is not None and shape.conv.kernel != (1, 1):
        rows, columns = shape.conv.kernel
        return f"{n}:{m} is realized for kernels of 1 x 1, not {rows} x {columns}; nearest: {share}"
    inputs = shape.in_features
    if inputs % m == 0:
        return None
    sizes = [size for size in range(2, inputs + 1) if inputs % size == 0]
    nearest = [size for size in sizes if size < m][-1:] + [size for size in sizes if size > m][:1]
    patterns = [(min(size - 1, max(1, round(Decimal(n * size) / m))), size) for size in nearest]
    fitting = [replace(option, sparsity=pattern) for pattern in patterns] or [share]
    told = ", ".join(map(str, fitting))
    return f"{n}:{m} needs a multiple of {m} inputs, not {inputs}; nearest: {told}"


def outlier_refusal(option: Option, shape: LayerShape) -> str | None:
    """The reason where oP% is not a single weight, or leaves none to round."""
    percent, weights = option.outlier_percent, shape.weights
    if percent is None:
        return None
    outliers, stay = removed_count(percent, weights), weights
    if option.sparsity is not None:
        stay -= removed_count(option.sparsity, weights)
    if 0 < outliers < stay:
        return None
    tenths = Decimal("0.1")
    least = (Decimal(100) / weights).quantize(tenths, ROUND_CEILING)
    most = (Decimal(100 * (stay - 1)) / weights).quantize(tenths, ROUND_FLOOR)
    nearest = replace(option, outlier_percent=least if outliers < 1 else most)
    told = f"; nearest: {nearest}" if least <= most else ""
    wrong = "is no weight" if outliers < 1 else "leaves no weight to round"
    return f"o{percent}% of [{shape.out_features}, {shape.in_features}] {wrong}{told}"


def rank_refusal(option: Option, shape: LayerShape, rank_multiple: int) -> str | None:
    """The reason where P % of the parameters are no rank: too few, or of a grouped convolution."""
    if option.rank_percent is None:
        return None
    if shape.conv is not None and shape.conv.groups > 1:
        return "rP% is not realized for grouped convolutions; sP%, wN and both together are"
    if ranks_of(option.rank_percent, shape, rank_multiple)[0]:
        return None
    least = least_percent(shape, rank_multiple).quantize(Decimal("0.1"), ROUND_CEILING)
    told = f"; nearest: {replace(option, rank_percent=least)}" if least < 100 else ""
    sizes = f"[{shape.out_features}, {shape.in_features}]"
    return (
        f"{option} of {sizes} is no rank that is a multiple of {rank_multiple} and"
        f" saves parameters{told}"
    )


def residual_refusal(option: Option, shape: LayerShape) -> str | None:
    """The reason where a residual is no smaller than the weight, or of a convolution."""
    if option.residual_rank is None:
        return None
    if shape.conv is not None:
        return "+rK is not realized for convolutions; sP%, wN and both together are"
    out, inputs = shape.out_features, shape.in_features
    if option.residual_rank < min(out, inputs):
        return None
    most = min(out, inputs) - 1
    told = f"; at most: {replace(option, residual_rank=most)}" if most else ""
    return f"a residual of rank {option.residual_rank} does not fit [{out}, {inputs}]{told}"
