"""What is packed into bytes: option indices, float64 arrays. Each begins with its format."""

import zlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from apportion.errors import ApportionError

Floats = NDArray[np.float64]
# Little-endian: the same bytes on every machine.
FLOAT64, FLOAT32, DEFLATED, BYTES, PAIRS = range(5)
MOST_IN_A_BYTE = 256


def pack_floats(values: Floats) -> bytes:
    """float64 in 4 bytes each where float32 holds them exactly, or deflated if that is shorter."""
    whole = values.astype("<f8").tobytes()
    with np.errstate(all="ignore"):  # what float32 cannot hold is seen below
        half = values.astype("<f4")
    # bits, since nan != nan and 0.0 == -0.0
    exact = half.astype("<f8").tobytes() == whole
    plain = bytes([FLOAT32]) + half.tobytes() if exact else bytes([FLOAT64]) + whole
    deflated = bytes([DEFLATED]) + zlib.compress(whole)
    return min(plain, deflated, key=len)


def unpack_floats(packed: bytes) -> Floats:
    """The very values. Raises ApportionError for bytes of an unknown format."""
    form, body = _parted(packed)
    if form == DEFLATED:
        body = zlib.decompress(body)
    elif form not in (FLOAT64, FLOAT32):
        raise _unknown(form)
    return np.frombuffer(body, "<f4" if form == FLOAT32 else "<f8").astype(np.float64)


def pack_indices(values: Sequence[int]) -> bytes:
    """Indices from 0 to 65,535 in a byte each where they fit, else in two."""
    wide = bool(len(values)) and max(values) >= MOST_IN_A_BYTE
    array = np.asarray(values, "<u2" if wide else "u1")
    return bytes([PAIRS if wide else BYTES]) + array.tobytes()


def unpack_indices(packed: bytes) -> list[int]:
    """The indices. Raises ApportionError for bytes of an unknown format."""
    form, body = _parted(packed)
    if form not in (BYTES, PAIRS):
        raise _unknown(form)
    indices: list[int] = np.frombuffer(body, "<u2" if form == PAIRS else "u1").tolist()
    return indices


def _parted(packed: bytes) -> tuple[int, bytes]:
    if not packed:
        raise ApportionError("the database holds a packed value without a format")
    return packed[0], packed[1:]


def _unknown(form: int) -> ApportionError:
    return ApportionError(f"the database holds packed values of format {form}, unknown here")
