"""The tensors of one weight under the steps w and o: codes, outliers, or plain values."""

from torch import Tensor

from apportion.kernels.formats import Format
from apportion.kernels.packing import pack_codes, pack_mask
from apportion.kernels.positions import pack_positions
from apportion.spaces.compressors.awq import awq
from apportion.spaces.compressors.gptq import gptq
from apportion.spaces.compressors.hqq import hqq
from apportion.spaces.compressors.outliers import largest, sensitive
from apportion.spaces.compressors.quantize import Quantized, quantize


def encode(
    weight: Tensor,
    format: Format,
    kept: Tensor | None,
    moment: Tensor | None,
    method: str | None,
) -> dict[str, Tensor]:
    """Everything that `kernels.formats` stores of a weight but low-rank pairs and residuals.

    Args:
        weight: float32 [out, in], finite.
        format: Without rank and residual.
        kept: bool [out, in]; weights that are False are removed. None where nothing is sparse.
        moment: float64 [in, in], the sum of x x^T; None: nothing is known of the inputs.
        method: Of the step w: rtn, hqq, or gptq or awq, which need the moment. None without that
            step.
    """
    mask = {} if kept is None else {"mask": pack_mask(kept.flatten())}
    if format.bits is None:
        name = "weight" if kept is None else "values"
        values = weight if kept is None else weight[kept]
        return mask | {name: values.to(format.torch_dtype, copy=True).contiguous()}
    rest, rounded = weight, kept
    outliers: dict[str, Tensor] = {}
    if format.outliers is not None:
        chosen = _outliers(weight, format, format.bits, format.outliers, kept, moment, method)
        rest, outliers = _set_apart(weight, chosen)
        rounded = ~chosen if kept is None else kept & ~chosen
    quantized = _quantized(rest, format, format.bits, rounded, moment, method)
    codes = quantized.codes.flatten() if kept is None else quantized.codes[kept]
    stored = {"codes": pack_codes(codes, format.bits), "scale": quantized.scale}
    if quantized.zero is not None:
        stored["zero"] = quantized.zero
    if quantized.input_scale is not None:
        stored["input_scale"] = quantized.input_scale
    return mask | stored | outliers


def _outliers(
    weight: Tensor,
    format: Format,
    bits: float,
    count: int,
    kept: Tensor | None,
    moment: Tensor | None,
    method: str | None,
) -> Tensor:
    """bool [out, in]: which weights are not rounded. Without data, and for hqq, the largest |w|."""
    if moment is None or method == "hqq":
        return largest(weight.abs(), count, kept)
    importance = moment.diagonal()
    return sensitive(weight, count, bits, format.group, format.symmetric, importance, kept)


def _set_apart(weight: Tensor, chosen: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """What the codes have to make up for, and the tensors of the chosen weights.

    Of an outlier that is what bfloat16 loses of it.
    """
    values = weight[chosen].bfloat16()
    places, counts = pack_positions(chosen.flatten().nonzero()[:, 0], chosen.numel())
    rest = weight.clone()
    rest[chosen] -= values.float()
    names = ("outlier_values", "outlier_places", "outlier_counts")
    return rest, dict(zip(names, (values, places, counts), strict=True))


def _quantized(
    weight: Tensor,
    format: Format,
    bits: float,
    kept: Tensor | None,
    moment: Tensor | None,
    method: str | None,
) -> Quantized:
    if method == "hqq":
        return hqq(weight, bits, format.group, kept)
    if method == "gptq" and moment is not None:
        return gptq(weight, bits, format.group, format.symmetric, moment, kept)
    if method == "awq" and moment is not None:
        return awq(weight, bits, format.group, format.symmetric, moment, kept)
    importance = None if moment is None else moment.diagonal()
    return quantize(weight, bits, format.group, format.symmetric, kept, importance)
