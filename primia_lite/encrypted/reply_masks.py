"""What a reply may tell: the logits, and nothing of the weights beside them.

A product of film and weights holds more than the result: every other coefficient is another combination of them, and
the second polynomial of a product, over that of the upload, *is* the weights. So a reply is re-randomised by a fresh
encryption of zero under the client's public key, and all coefficients but the logits are masked.

What this doesn't do: re-randomisation holds for keys that were made honestly; the noise in the logits isn't
hidden; so no circuit privacy is claimed. A linear head can be read off by at most as many queries as it has features; a
client that writes its own ciphertexts needs fewer, for it can put several weights into one logit.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import tenseal.sealapi as sealapi
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

from primia_lite.config import UserError
from primia_lite.encrypted.seal import Context, dump


def uniform(modulus: int, size: int) -> np.ndarray:
    """Integers uniform in [0, modulus), uint64 [size], by rejection from a ChaCha20 stream with a key of its own from
    the operating system (which makes its random bytes the same way, but slower)."""
    bits = modulus.bit_length()
    stream = Cipher(algorithms.ChaCha20(os.urandom(32), bytes(16)), mode=None).encryptor()
    out = np.empty(0, np.uint64)
    while len(out) < size:
        draws = np.frombuffer(stream.update(bytes(8 * (size - len(out)) + 64)), np.uint64) >> np.uint64(64 - bits)
        out = np.concatenate([out, draws[draws < modulus]])
    return out[:size]


class Mask:
    """Uniform in R_q, coefficient by coefficient and prime by prime (``moduli``), of ``n`` coefficients, but 0 in the
    ``places`` of the result. A second use is a UserError: the difference of two replies would show what it hid."""

    def __init__(self, moduli: list[int], n: int, places: Sequence[int]):
        self._moduli = np.array(moduli, np.uint64)[:, None]
        self._values = np.stack([uniform(modulus, n) for modulus in moduli])
        self._values[:, list(places)] = 0

    def hide(self, polynomial: np.ndarray) -> np.ndarray:
        """The sum with a polynomial, uint64 [primes, N], modulo each prime."""
        if self._values is None:
            raise UserError("this mask was used: draw a new one for each reply")
        values, self._values = self._values, None
        values += polynomial  # primes have at most 60 bits, so the sum fits
        # Below the modulus the difference wraps round to something huge, so the smaller one is the residue.
        return np.minimum(values, values - self._moduli)


class Blind:
    """All that hides one reply: an encryption of zero and a mask, which may be made before the film comes; used once,
    as its mask is."""

    def __init__(self, context: Context, encryptor: sealapi.Encryptor, level: int, places: Sequence[int]):
        self._context, self._level, self._zero = context, level, sealapi.Ciphertext()
        encryptor.encrypt_zero(context.level_ids[level], self._zero)
        self._mask = Mask(context.moduli_at(level), context.n, places)

    def seal(self, product: sealapi.Ciphertext) -> bytes:
        """A product as the reply that goes out: re-randomised, masked, in coefficient form."""
        context, scale = self._context, product.scale
        self._zero.scale = scale
        context.evaluator.add_inplace(product, self._zero)
        context.evaluator.transform_from_ntt_inplace(product)
        out = context.integers(dump(product), scale=scale, level=self._level).copy()
        out[0] = self._mask.hide(out[0])
        return context.compose(out, scale=scale, level=self._level)
