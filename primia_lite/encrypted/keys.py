"""The hospital's key, and reading the coefficients that it is entitled to."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import tenseal.sealapi as sealapi

from primia_lite.encrypted.seal import Context, dump


class SecretKey:
    """A ternary CKKS key of a hospital: encrypts, and reads single coefficients of a reply.

    Decrypting a whole plaintext at full precision, and showing it, gives the key away (Li and Micciancio, EUROCRYPT
    2021). :meth:`coefficients` computes only the few that are asked for. What :meth:`decrypt`, :meth:`slots` and
    :meth:`polynomial` return is for the key's owner only, who rounds or floods it before anyone else sees it.

    Attributes
    ----------
    ternary : the key itself, int8 [N] in {-1, 0, 1}
    """

    def __init__(self, context: Context):
        self.context = context
        self._generator, self._public = sealapi.KeyGenerator(context.seal), sealapi.PublicKey()
        self._key = self._generator.secret_key()
        self._generator.create_public_key(self._public)
        self._encryptor = sealapi.Encryptor(context.seal, self._public, self._key)
        rows = context.ntt_values(self._key)  # SEAL keeps its number-theoretic transform only
        self.ternary = context.from_ntt(rows[0]).astype(np.int8)
        self._marks = self._pieces(rows)

    def _pieces(self, rows: np.ndarray) -> list[bytes]:
        """Pieces of the key as SEAL saves it, of its transform modulo each prime, and of its coefficients."""
        saved, starts = dump(self._key), range(0, self.context.n, self.context.n // 4)
        pieces = [saved[start : start + 256] for start in range(256, len(saved) - 256, len(saved) // 8)]
        pieces += [row[start : start + 32].tobytes() for row in rows for start in starts]
        for kind in (np.int8, np.int64):
            pieces += [self.ternary[start : start + 256].astype(kind).tobytes() for start in starts]
        return pieces

    def to_bytes(self) -> bytes:
        """As SEAL saves it."""
        return dump(self._key)

    def public_key(self) -> bytes:
        return dump(self._public)

    def relin_keys(self) -> bytes:
        return dump(self._generator.create_relin_keys())

    def galois_keys(self, steps: Sequence[int]) -> bytes:
        """For rotations by just these numbers of slots."""
        elements = [pow(3, step % (self.context.n // 2), 2 * self.context.n) for step in steps]
        return dump(self._generator.create_galois_keys(elements))

    def encrypt(self, plaintext: sealapi.Plaintext) -> bytes:
        """Symmetric, with a seed in place of the second polynomial: half the bytes."""
        return dump(self._encryptor.encrypt_symmetric(plaintext))

    def is_inside(self, data: bytes) -> bool:
        """Whether a piece of the key is in these bytes: SEAL's, stored or compressed, or its coefficients.

        It finds mistakes; a key that was encoded in another way isn't found.
        """
        return any(mark in data for mark in self._marks)

    def coefficients(self, integers: np.ndarray, places: Sequence[int], level: int = 0) -> list[int]:
        """Coefficients of c0 + c1 s, as integers in (-q/2, q/2], of a ciphertext uint64 [2, primes, N]."""
        moduli = self.context.moduli_at(level)
        ternary = self.ternary.astype(np.int64)
        residues = []
        for c0, c1, modulus in zip(integers[0], integers[1], moduli, strict=True):
            low, high = (c1 & np.uint64((1 << 30) - 1)).astype(np.int64), (c1 >> np.uint64(30)).astype(np.int64)
            row = []
            for k in places:
                # Coefficient k of a product modulo X^N + 1: what wraps round changes its sign.
                factor = np.concatenate([ternary[k::-1], -ternary[:k:-1]])
                row.append((int(c0[k]) + int(low @ factor) + (int(high @ factor) << 30)) % modulus)
            residues.append(row)
        return [_chinese(column, moduli) for column in zip(*residues, strict=True)]

    def decrypt(self, ciphertext: sealapi.Ciphertext) -> np.ndarray:
        """All slots, complex [N / 2], in full precision, of a ciphertext in NTT form."""
        return np.array(self.context.encoder.decode_complex(self._decrypted(ciphertext)))

    def slots(self, data: bytes, scale: float, level: int) -> np.ndarray:
        """All slots of a batch's reply, complex [N / 2], in full precision."""
        context = self.context
        integers = context.integers(data, scale=scale, level=level)  # SEAL doesn't read what a stranger wrote
        ciphertext = context.load(context.compose(integers, scale=scale, level=level), sealapi.Ciphertext)
        context.evaluator.transform_to_ntt_inplace(ciphertext)
        return self.decrypt(ciphertext)

    def polynomial(self, ciphertext: sealapi.Ciphertext) -> np.ndarray:
        """All of c0 + c1 s, int64 [N] in (-q/2, q/2], of a ciphertext of one prime, in full precision."""
        (values,) = self.context.ntt_values(self._decrypted(ciphertext))
        return self.context.from_ntt(values)

    def _decrypted(self, ciphertext: sealapi.Ciphertext) -> sealapi.Plaintext:
        plaintext = sealapi.Plaintext()
        sealapi.Decryptor(self.context.seal, self._key).decrypt(ciphertext, plaintext)
        return plaintext


def _chinese(residues: Sequence[int], moduli: list[int]) -> int:
    """The integer in (-q/2, q/2] of those residues."""
    value, product = 0, 1
    for residue, modulus in zip(residues, moduli, strict=True):
        value += product * ((residue - value) * pow(product, -1, modulus) % modulus)
        product *= modulus
    return value if value <= product // 2 else value - product
