"""What a reply may tell: the kept coefficients, and nothing of the weights beside them.

A product of film and weights holds more than the result: every other coefficient is another combination of them, and
the second polynomial of a product, over that of the upload, *is* the weights. So a reply is re-randomised by a fresh
encryption of zero under the client's public key, and all coefficients but the kept ones are masked.

What this doesn't do: re-randomisation holds for keys that were made honestly; the noise in the kept coefficients isn't
hidden; so no circuit privacy is claimed. A linear head can be read off by as many queries as it has weights.
"""

from __future__ import annotations

import os

import numpy as np
import tenseal.sealapi as sealapi

from primia_lite.config import UserError
from primia_lite.encrypted.seal import Context, dump


def uniform(modulus: int, size: int) -> np.ndarray:
    """Integers uniform in [0, modulus), uint64 [size], from the operating system's generator, by rejection."""
    bits = modulus.bit_length()
    out = np.empty(0, np.uint64)
    while len(out) < size:
        draws = np.frombuffer(os.urandom(8 * (size - len(out)) + 64), np.uint64) >> np.uint64(64 - bits)
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
        total = polynomial + values  # primes have at most 60 bits, so the sum fits
        return np.where(total >= self._moduli, total - self._moduli, total)


def seal_reply(
    context: Context, encryptor: sealapi.Encryptor, product: sealapi.Ciphertext, level: int, keep: list[int]
):
    """A product as the reply that goes out: re-randomised, masked, in coefficient form; bytes."""
    scale, zero = product.scale, sealapi.Ciphertext()
    encryptor.encrypt_zero(context.level_ids[level], zero)
    zero.scale = scale
    context.evaluator.add_inplace(product, zero)
    context.evaluator.transform_from_ntt_inplace(product)
    integers = context.integers(dump(product), scale=scale, level=level).copy()
    integers[0] = Mask(context.moduli_at(level), context.n, keep).hide(integers[0])
    return context.compose(integers, scale=scale, level=level)
