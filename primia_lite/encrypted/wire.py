"""What crosses the line between a hospital and a service: its form, how large it may be, and texts of strangers."""

from __future__ import annotations

import struct

from primia_lite.encrypted.packing import Packing
from primia_lite.encrypted.seal import CiphertextError

# A film's ciphertexts in one body: their number, then each one's length and bytes.
_COUNT = struct.Struct("<I")
_MOST_PARTS = 1 << 14


def join(parts: list[bytes]) -> bytes:
    """A film's ciphertexts as one body."""
    return b"".join([_COUNT.pack(len(parts)), *(piece for part in parts for piece in (_COUNT.pack(len(part)), part))])


def split(body: bytes) -> list[bytes]:
    """:func:`join` undone.

    Raises
    ------
    CiphertextError
        Lengths that don't fit.
    """
    if len(body) < 4 or (number := _COUNT.unpack_from(body)[0]) > _MOST_PARTS:
        raise CiphertextError("this body isn't a list of ciphertexts: send what wire.join returned")
    parts, place = [], 4
    for _ in range(number):
        if place + 4 > len(body):
            raise CiphertextError("this list of ciphertexts was cut")
        (length,) = _COUNT.unpack_from(body, place)
        place += 4
        if place + length > len(body):
            raise CiphertextError("this list of ciphertexts was cut")
        parts.append(body[place : place + length])
        place += length
    if place != len(body):
        raise CiphertextError(f"{len(body) - place} bytes follow the ciphertexts")
    return parts


def most_key_bytes(packing: Packing) -> int:
    """What a client's public material can be at most: each evaluation key has a pair of polynomials for each prime."""
    p = packing.parameters
    polynomial = 8 * p.poly_modulus_degree * len(p.coeff_mod_bit_sizes)
    evaluation = (len(packing.rotations) + packing.relinearise) * (len(p.coeff_mod_bit_sizes) - 1)
    # Galois keys are kept in a table with a place for each of N rotations.
    table = 64 * p.poly_modulus_degree if packing.rotations else 0
    return 2 * polynomial * (1 + evaluation) + table + 8192


def most_upload_bytes(packing: Packing) -> int:
    """What a film's ciphertexts can be at most, as one body."""
    return _most_bytes(packing, packing.uploads, 0)


def most_reply_bytes(packing: Packing) -> int:
    """What the reply to a film can be at most, as one body."""
    return _most_bytes(packing, len(packing.keep), packing.reply_level)


def _most_bytes(packing: Packing, ciphertexts: int, level: int) -> int:
    p = packing.parameters
    primes = max(1, len(p.coeff_mod_bit_sizes) - 1) - level
    return ciphertexts * (2 * 8 * p.poly_modulus_degree * primes + 1024) + 1024
