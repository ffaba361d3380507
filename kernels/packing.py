"""Small integers and masks as dense streams of bits.

Little-endian: bit j of code i is bit i * bits + j of the stream, and bit p of the stream is bit
p % 8 (from the least significant) of byte p // 8. The last byte is filled up with zeros.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from apportion.errors import ApportionError, InvalidInput

CODE_BITS = (2, 3, 4, 8)
# Eight codes of `bits` bits are exactly `bits` bytes, and fit one 64-bit word.
CODES_PER_WORD = 8


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that `count` codes of `bits` bits take."""
    return -(-count * bits // 8)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Codes, uint8 [n], each below 2^bits, as uint8 [ceil(n * bits / 8)].

    Raises:
        ApportionError: If a code does not fit, or `bits` is none of 2, 3, 4, 8.
    """
    _check_bits(bits)
    if codes.numel() and int(codes.max()) >= 2**bits:
        raise ApportionError(f"code {int(codes.max())} does not fit {bits} bits")
    return _pack(codes, bits)


def unpack_codes(packed: Tensor, bits: int, count: int) -> Tensor:
    """Inverse of `pack_codes`: uint8 [count].

    Raises:
        ApportionError: If `bits` is none of 2, 3, 4, 8.
        InvalidInput: If `packed` is not as long as `count` codes are.
    """
    _check_bits(bits)
    return _unpack(packed, bits, count)


def pack_mask(mask: Tensor) -> Tensor:
    """A mask, bool [n], as uint8 [ceil(n / 8)]."""
    return _pack(mask.to(torch.uint8), 1)


def unpack_mask(packed: Tensor, count: int) -> Tensor:
    """Inverse of `pack_mask`: bool [count]. Raises InvalidInput on a wrong length."""
    return _unpack(packed, 1, count).to(torch.bool)


def _check_bits(bits: int) -> None:
    if bits not in CODE_BITS:
        raise ApportionError(f"codes of {bits} bits are not stored; known: {CODE_BITS}")


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
    if packed.numel() != packed_bytes(count, bits):
        need = packed_bytes(count, bits)
        raise InvalidInput(f"{packed.numel()} packed bytes; {count} x {bits} bits need {need}")
    if bits == 8:
        return packed.clone()
    columns = pad(packed, (0, -packed.numel() % bits)).view(-1, bits)
    words = torch.zeros(len(columns), dtype=torch.int64, device=packed.device)
    for byte in range(bits):
        words |= columns[:, byte].to(torch.int64) << 8 * byte
    codes = [(words >> bits * place & 2**bits - 1) for place in range(CODES_PER_WORD)]
    return torch.stack(codes, dim=1).to(torch.uint8).flatten()[:count]
