"""Shamir's secret sharing (Communications of the ACM 22, 1979) of 256-bit secrets.

The field is the integers modulo 2^521 - 1, the prime of NIST's curve P-521 (SP 800-186): larger than any 256-bit
secret, so each secret is one field element, and fewer than ``threshold`` shares are independent of it.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from functools import lru_cache

PRIME = 2**521 - 1
SECRET_BYTES, SHARE_BYTES = 32, 66


def split(secret: bytes, threshold: int, points: Sequence[int]) -> dict[int, bytes]:
    """A share of 66 bytes for each point; any ``threshold`` of them give the secret of 32, fewer tell nothing of it."""
    if len(secret) != SECRET_BYTES:
        raise ValueError(f"a secret has {SECRET_BYTES} bytes, got {len(secret)}")
    if not 1 <= threshold <= len(points) or len(set(points)) < len(points) or min(points) < 1:
        raise ValueError(f"{len(points)} points for a threshold of {threshold}: they must be distinct and above 0")
    # From the highest coefficient down to the secret, as Horner's rule takes them.
    coefficients = [secrets.randbelow(PRIME) for _ in range(threshold - 1)] + [int.from_bytes(secret, "big")]
    shares = {}
    for point in points:
        value = 0
        for coefficient in coefficients:
            value = (value * point + coefficient) % PRIME
        shares[point] = value.to_bytes(SHARE_BYTES, "big")
    return shares


def combine(shares: Mapping[int, bytes], threshold: int) -> bytes:
    """The secret from shares by point, of which the smallest are used; ValueError if they belong to no secret."""
    if not 1 <= threshold <= len(shares):
        raise ValueError(f"{len(shares)} shares, but {threshold} are needed")
    if any(len(share) != SHARE_BYTES for share in shares.values()):
        raise ValueError(f"a share has {SHARE_BYTES} bytes")
    points = tuple(sorted(shares)[:threshold])
    weights = _at_zero(points)
    value = sum(w * int.from_bytes(shares[p], "big") for w, p in zip(weights, points, strict=True)) % PRIME
    if value >> (8 * SECRET_BYTES):
        raise ValueError("these shares belong to no secret: one of them is false")
    return value.to_bytes(SECRET_BYTES, "big")


@lru_cache(maxsize=4096)
def _at_zero(points: tuple[int, ...]) -> tuple[int, ...]:
    """Lagrange's coefficients for the value at 0."""
    out = []
    for p in points:
        over = under = 1
        for q in points:
            if q != p:
                over, under = over * q % PRIME, under * (q - p) % PRIME
        out.append(over * pow(under, -1, PRIME) % PRIME)
    return tuple(out)
