"""What a reply may tell: the kept coefficients, and nothing of the weights beside them.

A product of film and weights holds more than the result: every other coefficient is another combination of them, and
the second polynomial of a product, over that of the upload, *is* the weights. So a reply is re-randomised by a fresh
encryption of zero under the client's public key, and all coefficients but the kept ones are masked.

What this doesn't do: re-randomisation holds for keys that were made honestly; the noise in the kept coefficients isn't
hidden; so no circuit privacy is claimed. A linear head can be read off by at most as many queries as it has features; a
client that writes its own ciphertexts needs fewer, for it can put several weights into one logit.
"""

from __future__ import annotations

import os

import numpy as np
import tenseal.sealapi as sealapi
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

from primia_lite.config import UserError
from primia_lite.encrypted.seal import Context


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
    """Uniform in R_q, coefficient by coefficient and prime by prime, but 0 where the result is; to be used once.

    Parameters
    ----------
    moduli : the primes of the reply
    n : coefficients
    keep : places of the result's coefficients

    Raises
    ------
    UserError
        Used a second time: the difference of two replies would show what it hid.
    """

    def __init__(self, moduli: list[int], n: int, keep: list[int]):
        self._moduli = np.array(moduli, np.uint64)[:, None]
        self._values = np.stack([uniform(modulus, n) for modulus in moduli])
        self._values[:, list(keep)] = 0

    def hide(self, polynomial: np.ndarray) -> np.ndarray:
        """The sum with a polynomial, uint64 [primes, N], modulo each prime."""
        if self._values is None:
            raise UserError("this mask was used: draw a new one for each reply")
        values, self._values = self._values, None
        values += polynomial  # primes have at most 60 bits, so the sum fits
        # Below the modulus the difference wraps round to something huge, so the smaller one is the residue.
        return np.minimum(values, values - self._moduli)


class Blind:
    """All that hides one reply, made before the film comes: an encryption of zero and a mask, as integers; used once.

    Raises
    ------
    UserError
        Used a second time.
    """

    def __init__(self, context: Context, encryptor: sealapi.Encryptor, level: int, keep: list[int]):
        zero = sealapi.Ciphertext()
        encryptor.encrypt_zero(context.level_ids[level], zero)
        self._context, self._level = context, level
        self._moduli = np.array(context.moduli_at(level), np.uint64)[:, None]
        self._values = _masked(context, zero, level, keep)

    def seal(self, product: sealapi.Ciphertext) -> bytes:
        """As :func:`seal_reply`."""
        if self._values is None:
            raise UserError("this mask was used: draw a new one for each reply")
        values, self._values = self._values, None
        scale = product.scale
        self._context.evaluator.transform_from_ntt_inplace(product)
        values += self._context.own_integers(product, self._level)
        return self._context.compose(np.minimum(values, values - self._moduli), scale=scale, level=self._level)


def seal_reply(
    context: Context, encryptor: sealapi.Encryptor, product: sealapi.Ciphertext, level: int, keep: list[int]
) -> bytes:
    """A product as the reply that goes out: re-randomised, masked, in coefficient form; bytes."""
    scale, zero = product.scale, sealapi.Ciphertext()
    encryptor.encrypt_zero(context.level_ids[level], zero)
    zero.scale = scale
    context.evaluator.add_inplace(product, zero)
    return context.compose(_masked(context, product, level, keep), scale=scale, level=level)


def _masked(context: Context, ciphertext: sealapi.Ciphertext, level: int, keep: list[int]) -> np.ndarray:
    """Its integers in coefficient form, uint64 [2, primes, N], with a new mask on the first polynomial."""
    context.evaluator.transform_from_ntt_inplace(ciphertext)
    out = context.own_integers(ciphertext, level).copy()
    out[0] = Mask(context.moduli_at(level), context.n, keep).hide(out[0])
    return out
