"""Which integer codes there are, and what they stand for. No torch: the option grammar reads it.

A code q stands for w = (q - middle(bits)) * scale + zero, with the scale and zero of its group.
"""

# log2(3), as options are spelled: codes of three values, five of which are stored in a byte.
TERNARY_BITS = 1.58
CODE_BITS: tuple[float, ...] = (TERNARY_BITS, 2, 3, 4, 5, 6, 8)

# Of keys and values in a cache, whose codes stand for q * scale + zero (`kernels.packed_cache`).
CACHE_BITS = (2, 3, 4, 8)


def levels(bits: float) -> int:
    """How many codes there are: 3 ternary ones, 2^bits others."""
    return 3 if bits == TERNARY_BITS else int(2**bits)


def middle(bits: float) -> int:
    """The code that stands for the zero alone: 1 of the ternary ones, 2^(bits - 1) of others."""
    return levels(bits) // 2
