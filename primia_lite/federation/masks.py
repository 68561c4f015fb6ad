"""Masks: keystreams of ChaCha20 (RFC 8439), added modulo 2^32.

A seed is the cipher's whole 256-bit key and makes one mask only, so the nonce may stay 0.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

MAX_WORDS = 1 << 36  # then the cipher's 32-bit counter of 64-byte blocks starts again
_CHUNK = 1 << 16  # words; stays in the processor's cache


def add_masks(vector: np.ndarray, seeds: Iterable[tuple[bytes, int]]) -> None:
    """Add the mask of each seed (sign 1) or take it off (sign -1), modulo 2^32, in place.

    Parameters
    ----------
    vector : uint32 [L]
    seeds : 32 bytes and a sign each
    """
    streams = [(Cipher(algorithms.ChaCha20(seed, bytes(16)), mode=None).encryptor(), sign) for seed, sign in seeds]
    zeros, words = np.zeros(_CHUNK, "<u4"), np.empty(_CHUNK, "<u4")
    for start in range(0, len(vector), _CHUNK):
        part = vector[start : start + _CHUNK]
        source, stream = (memoryview(a[: len(part)]).cast("B") for a in (zeros, words))
        for cipher, sign in streams:
            cipher.update_into(source, stream)
            (np.add if sign > 0 else np.subtract)(part, words[: len(part)], out=part)
