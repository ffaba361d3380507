"""The spaces of the shipped model that hold one axis each, the joint one, and all in one."""

from typing import Any

WEIGHTS = ("*.self_attn.*", "*.mlp.*")
BITS = ("bf16", "w8", *(f"w{bits}g64:gptq" for bits in (6, 5, 4, 3, 2)))
SPARSITY = (*(f"s{percent}%:sparsegpt" for percent in range(20, 90, 10)), "2:4:sparsegpt")
RANK = tuple(f"r{percent}%" for percent in (90, 75, 60, 50, 40, 25))
VALUES = ("v85%", "v70%", "v50%", "v35%")
"""Ranks 40, 32, 24 and 16 of the 48 value dimensions of a head."""
HEADS = ("c75%", "c50%", "c25%")
"""The four heads of a layer, one, two or three fewer."""
CHANNELS = tuple(f"c{percent}%" for percent in (90, 75, 60, 50, 40, 25))
DROPS = ("keep", "drop")
COMPOSED = ("s50%:sparsegpt+w4g64:gptq", "r50%",
            *(f"w{bits}g64:gptq+o0.5%" for bits in (5, 4, 3)))  # fmt: skip
"""Outliers kept dense are sparsity composed with bits: steps of an eighth of a bit."""
COMPOSED_HEADS = ("c75%+w8", "c75%+w4:gptq", "c50%+w4:gptq")
"""64 does not divide the inputs that three heads give."""
COMPOSED_VALUES = (*(f"v85%+w{bits}g32:gptq" for bits in (6, 5)),
                   *(f"v70%+w{bits}g64:gptq" for bits in (6, 5, 4, 3)),
                   *(f"v50%+w{bits}g32:gptq" for bits in (4, 3)))  # fmt: skip
"""The outputs of four heads are inputs of the output layer: 160, 128 and 96."""
COMPOSED_CHANNELS = ("c75%+w8", *(f"c87.5%+w{bits}g64:gptq" for bits in (4, 3)),
                     *(f"c75%+w{bits}g64:gptq" for bits in (4, 3)), "c50%+w4g64:gptq")  # fmt: skip

Entry = dict[str, Any]


def entries(
    weights: tuple[str, ...] = (),
    heads: tuple[str, ...] = (),
    channels: tuple[str, ...] = (),
    drops: tuple[str, ...] = (),
) -> list[Entry]:
    """`[[space]]` of a study file; what has no options is left out."""
    given = {
        WEIGHTS: ("dense", *weights) if weights else (),
        ("attention:*",): (*drops, *heads) if drops or not heads else ("keep", *heads),
        ("mlp:*",): (*drops, *channels) if drops or not channels else ("keep", *channels),
        ("block:*",): drops,
    }
    return [
        {"sites": list(sites), "options": list(options)}
        for sites, options in given.items()
        if options
    ]


AXES = {
    "bits": entries(weights=BITS),
    "sparsity": entries(weights=SPARSITY),
    "rank": entries(weights=RANK, heads=VALUES),
    "width": entries(heads=HEADS, channels=CHANNELS),
    "drop": entries(drops=DROPS),
}
JOINT = entries((*BITS, *COMPOSED), (*COMPOSED_HEADS, *COMPOSED_VALUES), COMPOSED_CHANNELS, DROPS)
EVERYTHING = entries(
    (*BITS, *COMPOSED, *SPARSITY, *RANK),
    (*HEADS, *COMPOSED_HEADS, *VALUES, *COMPOSED_VALUES),
    (*CHANNELS, *COMPOSED_CHANNELS),
    DROPS,
)
