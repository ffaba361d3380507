"""Small integers and masks as dense streams of bits.

Little-endian: bit j of code i is bit i * bits + j of the stream, and bit p of the stream is bit
p % 8 (from the least significant) of byte p // 8. The last byte is filled up with zeros.

Ternary codes go five to a byte, since 3^5 = 243 <= 256: code i is digit i % 5 to the base 3 (from
the least significant) of byte i // 5.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from apportion.errors import ApportionError, InvalidInput
from apportion.kernels.codes import CODE_BITS, TERNARY_BITS, levels

# Eight codes of `bits` bits are exactly `bits` bytes, and fit one 64-bit word.
CODES_PER_WORD = 8
TRITS = (1, 3, 9, 27, 81)


def packed_bytes(count: int, bits: float) -> int:
    """Bytes that `count` codes of `bits` bits take: ceil(count * bits / 8); of ternary, / 5."""
    if bits == TERNARY_BITS:
        return -(-count // len(TRITS))
    return -(-count * int(bits) // 8)


def pack_codes(codes: Tensor, bits: float) -> Tensor:
    """Codes, uint8 [n], each below `levels(bits)`, as uint8 [packed_bytes(n, bits)].

    Raises:
        ApportionError: If a code does not fit, or `bits` is none of `CODE_BITS`.
    """
    _check_bits(bits)
    if codes.numel() and int(codes.max()) >= levels(bits):
        raise ApportionError(f"code {int(codes.max())} does not fit {bits} bits")
    return _pack_trits(codes) if bits == TERNARY_BITS else _pack(codes, int(bits))


def unpack_codes(packed: Tensor, bits: float, count: int) -> Tensor:
    """Inverse of `pack_codes`: uint8 [count].

    Raises:
        ApportionError: If `bits` is none of `CODE_BITS`.
        InvalidInput: If `packed` is not as long as `count` codes are.
    """
    _check_bits(bits)
    _check_length(packed, bits, count)
    if bits == TERNARY_BITS:
        return _unpack_trits(packed, count)
    return _unpack(packed, int(bits), count)


def pack_mask(mask: Tensor) -> Tensor:
    """A mask, bool [n], as uint8 [ceil(n / 8)]."""
    return _pack(mask.to(torch.uint8), 1)


def unpack_mask(packed: Tensor, count: int) -> Tensor:
    """Inverse of `pack_mask`: bool [count]. Raises InvalidInput on a wrong length."""
    _check_length(packed, 1, count)
    return _unpack(packed, 1, count).to(torch.bool)


def _check_bits(bits: float) -> None:
    if bits not in CODE_BITS:
        raise ApportionError(f"codes of {bits} bits are not stored; known: {CODE_BITS}")


def _check_length(packed: Tensor, bits: float, count: int) -> None:
    need = packed_bytes(count, bits)
    if packed.numel() != need:
        raise InvalidInput(f"{packed.numel()} packed bytes; {count} x {bits} bits need {need}")


def _pack_trits(codes: Tensor) -> Tensor:
    rows = pad(codes, (0, -codes.numel() % len(TRITS))).view(-1, len(TRITS))
    worth = torch.tensor(TRITS, dtype=torch.uint8, device=codes.device)
    return (rows * worth).sum(1, dtype=torch.uint8)


def _unpack_trits(packed: Tensor, count: int) -> Tensor:
    # Any byte stands for five codes: those from 243 on, which nothing writes, for some others' too.
    digits = torch.stack([packed // trit % 3 for trit in TRITS], dim=1)
    return digits.flatten()[:count]


def _pack(codes: Tensor, bits: int) -> Tensor:
    if bits == 8:
        return codes.clone()
    count = codes.numel()
    rows = pad(codes, (0, -count % CODES_PER_WORD)).view(-1, CODES_PER_WORD)
    words = torch.zeros(len(rows), dtype=torch.int64, device=codes.device)
    for place in range(CODES_PER_WORD):
        words |= rows[:, place].to(torch.int64) << bits * place
    columns = [(words >> 8 * byte & 255).to(torch.uint8) for byte in range(bits)]
    return torch.stack(columns, dim=1).flatten()[: packed_bytes(count, bits)]


def _unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    if bits == 8:
        return packed.clone()
    columns = pad(packed, (0, -packed.numel() % bits)).view(-1, bits)
    words = torch.zeros(len(columns), dtype=torch.int64, device=packed.device)
    for byte in range(bits):
        words |= columns[:, byte].to(torch.int64) << 8 * byte
    codes = [(words >> bits * place & 2**bits - 1) for place in range(CODES_PER_WORD)]
    return torch.stack(codes, dim=1).to(torch.uint8).flatten()[:count]
