"""Integers modulo 2³²: fixed point, additive shares, streams that two parties draw alike, exact convolutions."""

from __future__ import annotations

import secrets

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from torch.nn import functional as F

RING_BITS = 32
PIECE = 1 << 16  # bytes of a stream at a time: they stay in the processor's cache


def encode(values, fraction: int) -> np.ndarray:
    """Real numbers as fixed point with ``fraction`` bits behind the point: uint32, negative ones wrap."""
    return np.round(np.asarray(values, np.float64) * 2**fraction).astype(np.int64).astype(np.uint32)


def decode(values: np.ndarray, fraction: int) -> np.ndarray:
    return values.view(np.int32) / 2.0**fraction


def share(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two additive shares: their sum is ``values``, each alone is uniform."""
    first = Stream(secrets.token_bytes(16)).draw(values.shape)
    return first, values - first


class Stream:
    """AES-128 in counter mode: what a dealer and a server draw alike from a seed of 16 bytes, instead of sending it."""

    def __init__(self, seed: bytes) -> None:
        self._cipher = Cipher(algorithms.AES(seed), modes.CTR(bytes(16))).encryptor()

    def draw(self, shape, dtype=np.uint32) -> np.ndarray:
        out = np.empty(shape, dtype)
        view = memoryview(out.reshape(-1)).cast("B") if out.size else memoryview(b"")
        zeros, buffer = bytes(PIECE), bytearray(PIECE + 16)
        for start in range(0, len(view), PIECE):
            n = min(PIECE, len(view) - start)
            self._cipher.update_into(zeros[:n] if n < PIECE else zeros, buffer)
            view[start : start + n] = memoryview(buffer)[:n]
        return out

    def bits(self, n: int) -> np.ndarray:
        return np.unpackbits(self.draw((n + 7) // 8, np.uint8), count=n)


class Factor:
    """A weight in Z_2³², split once into signed halves of 16 bits for :func:`product`."""

    def __init__(self, weight: np.ndarray) -> None:
        self.shape = weight.shape
        low = weight.astype(np.uint16).view(np.int16)
        high = ((weight - low.astype(np.int32).view(np.uint32)) >> np.uint32(16)).astype(np.uint16).view(np.int16)
        self.low, self.high = (torch.from_numpy(half.astype(np.float64)) for half in (low, high))


def product(x: np.ndarray, weight: Factor, stride: int = 1, padding: int = 0, groups: int = 1) -> np.ndarray:
    """x * weight modulo 2³², a convolution or (for a weight of two dimensions) a matrix product, by two in float64:
    x * low + 2¹⁶ (x mod 2¹⁶) * high.

    The second is exact, as its sums stay below 2⁵³. Those of the first do while operands look uniform, and masked ones
    do: a sum of K products deviates by 2⁴⁶ √K / 3, so that K = 4,608 (ResNet-18's widest) is 5.7 deviations away. A sum
    beyond loses its last bit, which lies behind every cut.
    """
    full = torch.from_numpy(x.view(np.int32).astype(np.float64))
    low = torch.from_numpy(x.astype(np.uint16).view(np.int16).astype(np.float64))
    if len(weight.shape) == 2:
        parts = full @ weight.low.T, low @ weight.high.T
    else:
        parts = (
            F.conv2d(full, weight.low, stride=stride, padding=padding, groups=groups),
            F.conv2d(low, weight.high, stride=stride, padding=padding, groups=groups),
        )
    first, second = (part.to(torch.int64).numpy().astype(np.uint32) for part in parts)
    return first + (second << np.uint32(16))


def packed_bits(bits: int) -> int:
    """The width, of those that :func:`pack` knows, that ``bits`` travel in."""
    return next(width for width in (16, 17, 18, 20, 24, 32) if width >= bits)


def pack(x: np.ndarray, bits: int) -> bytes:
    """The low ``bits`` of each entry: all 32, or 16 and then 0, 1, 2, 4 or 8 more, which share bytes."""
    if bits == 32:
        return x.tobytes()
    low, more, x = x.astype(np.uint16).tobytes(), bits - 16, x.reshape(-1)
    if not more:
        return low
    per = 8 // more
    high = np.zeros(-(-x.size // per) * per, np.uint8)
    high[: x.size] = (x >> np.uint32(16)) & np.uint32((1 << more) - 1)
    out = high[0::per].copy()
    for i in range(1, per):
        out |= high[i::per] << np.uint8(i * more)
    return low + out.tobytes()


def unpack(data, bits: int, n: int) -> np.ndarray:
    if bits == 32:
        return np.frombuffer(data, np.uint32, n)
    out, more = np.frombuffer(data, np.uint16, n).astype(np.uint32), bits - 16
    if more:
        per, high, mask = 8 // more, np.frombuffer(data, np.uint8, offset=2 * n), np.uint8((1 << more) - 1)
        for i in range(per):
            rows = out[i::per]
            rows |= ((high[: len(rows)] >> np.uint8(i * more)) & mask).astype(np.uint32) << np.uint32(16)
    return out
