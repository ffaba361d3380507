"""What the grammar has and this version does not realize."""

from apportion.kernels.codes import CODE_BITS
from apportion.spaces.grammar import Option


def unrealized(option: Option) -> str | None:
    """Why this version does not realize `option`, though the grammar has it; None if it does."""
    if option.name == "fp16":
        return "fp16 is not realized yet; realized: f32, bf16"
    if option.narrows:
        return unrealized(option.rest)
    if option.rank_percent is not None and len(option.steps) > 1:
        alone = Option(rank_percent=option.rank_percent)
        return f"{option}: rank together with other steps is not realized yet; realized: {alone}"
    if option.bits is not None and option.bits not in CODE_BITS:
        realized = ", ".join(f"w{bits}" for bits in CODE_BITS)
        return f"{option}: {option.bits} bits are not realized yet; realized: {realized}"
    return _unrealized_activations(option) if option.activation_bits is not None else None


def _unrealized_activations(option: Option) -> str | None:
    realized = "w8a8s" if option.static_activations else "w8a8"
    if option.steps != ("w",) or option.group is not None:
        return f"{option}: int8 activations are realized only as {realized}"
    if option.bits != 8:
        return f"{option}: int8 activations are realized only with 8-bit weights: {realized}"
    if option.scales_inputs:
        known = f"{realized}, w8:awq"
        return f"{option}: scaled inputs at 8 bits are not realized yet; realized: {known}"
    return None
